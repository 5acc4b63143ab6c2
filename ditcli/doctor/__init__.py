"""`ditcli doctor`: what of this machine helps or hinders, each finding with its remedy. Runs without torch."""
