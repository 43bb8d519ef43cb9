"""python -m osync is the command osync."""

from osync.cli.user import main

main()
