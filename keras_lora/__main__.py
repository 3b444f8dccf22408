"""The command: python -m keras_lora."""

import sys

from keras_lora.files.command import main

if __name__ == "__main__":
    sys.exit(main())
