"""`python -m tfops.gradcheck`."""

import sys

from tfops.gradcheck import main

if __name__ == "__main__":
    sys.exit(main())
