"""`python -m timm_spot.cli`, for launchers such as accelerate's."""
from __future__ import annotations

from . import main

if __name__ == '__main__':
    main()
