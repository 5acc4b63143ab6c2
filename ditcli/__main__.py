"""`python -m ditcli`."""

from ditcli.cli.main import run

run()
