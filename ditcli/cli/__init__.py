"""The command line: parse, build a config, call one workflow, print the result. No tensors here."""
