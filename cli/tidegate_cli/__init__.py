"""The `tidegate` command.

`main` parses arguments and prints errors; every other module is imported only
by the sub-command that needs it, so that `tidegate --help` stays quick. No
verdict is computed here: the model, the kernel and the dry run are asked.
"""
