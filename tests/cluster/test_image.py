"""docker/Dockerfile built without a daemon on a bare Debian with Python, and run as its own user.

Slow, because it installs torch: REID_DIST_IMAGE=1 runs it. It needs root, buildah and debootstrap. REID_DIST_BUILDAH
holds more flags for buildah's build and run, such as -v for certificates, or for a torch that is not to be installed.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def buildah(tmp_path):
    """Runs buildah with a storage of its own."""
    if not os.environ.get("REID_DIST_IMAGE"):
        pytest.skip("slow: REID_DIST_IMAGE=1 builds the image")
    if os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("needs root, buildah and debootstrap")
    env = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    storage = ["--root", str(tmp_path / "storage"), "--runroot", str(tmp_path / "run"), "--storage-driver", "overlay"]

    def call(*words, stdin=None):
        done = subprocess.run(
            ["buildah", *storage, *map(str, words)],
            env=env,
            cwd=REPOSITORY,
            stdin=stdin,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    yield call
    call("rm", "--all")
    call("rmi", "--all", "--force")


def test_the_image_builds_in_a_clean_root_and_trains_as_its_own_user(buildah, tmp_path):
    packages = "python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tmp_path / "root")]
    subprocess.run(command, check=True, capture_output=True)
    base = buildah("from", "scratch").strip()
    buildah("add", base, tmp_path / "root", "/")
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", base)
    buildah("commit", base, "base")
    more = shlex.split(os.environ.get("REID_DIST_BUILDAH", ""))
    flags = ["--pull=never", "--network=host", "--layers", "--build-arg", "BASE_IMAGE=base", *more]
    buildah("build", *flags, "-f", "docker/Dockerfile", "-t", "image", ".")

    box = buildah("from", "--pull=never", "image").strip()
    run = ("run", "--network=host", *more, box, "--")
    assert buildah(*run, "id", "-u").strip() == "10001"
    buildah(*run, *"python -m reid_dist.data.synthetic --out /tmp/data --ids 8 --cams 2 --images 3 --seed 0".split())
    words = "--cfg configs/demo.yaml --root /tmp/data --output /tmp/runs DATA.TRAIN_BATCH 32 TRAIN.MAX_STEPS 3"
    assert "ranked lists" in buildah(*run, "launch/torchrun.sh", *words.split())
    # A second build finds the layer with what we depend on, whatever has changed in the code.
    again = buildah("build", *flags, "-f", "docker/Dockerfile", "-t", "image", ".")
    assert "Using cache" in again
