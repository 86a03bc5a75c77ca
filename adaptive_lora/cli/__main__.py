"""`python -m adaptive_lora.cli`."""

from adaptive_lora.cli import main

if __name__ == "__main__":
    main()
