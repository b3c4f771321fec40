"""`python -m imgadapt PROGRAM ...`."""

from imgadapt.cli import main

main()
