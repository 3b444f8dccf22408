"""The command: python -m keras_lora."""

import sys

from keras_lora.files import command

if __name__ == "__main__":
    sys.exit(command.main())
