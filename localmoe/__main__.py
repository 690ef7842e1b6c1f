"""`python -m localmoe` is `localmoe`."""

from .cli import main

if __name__ == "__main__":
    main()
