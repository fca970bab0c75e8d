"""`python -m data_prep.parts`: fetch and convert the built-in models and data."""

from common.errors import run_cli
from data_prep.parts.builtin import main

if __name__ == "__main__":
    run_cli(main)
