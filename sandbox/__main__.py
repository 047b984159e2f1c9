"""`python -m sandbox --port N --config FILE`."""

import sys

from sandbox.app import main

sys.exit(main())
