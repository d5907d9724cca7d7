"""The image's HEALTHCHECK: exit code 0 if the server in this container generates a token."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from launch.command import loopback_url
from launch.demo import is_healthy
from launch.docker.knobs import read

if __name__ == "__main__":
    settings = read(os.environ, [])
    sys.exit(0 if is_healthy(loopback_url(settings.host, settings.port)) else 1)
