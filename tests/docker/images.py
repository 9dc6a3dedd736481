"""Images built by buildah on a Debian that debootstrap makes: no Docker engine, no registry.

It stands in for `debian:bookworm-slim`, which has the same packages, and for NVIDIA's images, which have more. So the
steps of a Dockerfile are proven, and CUDA is not. Everything lies in the folder of IMAGE_LAB, or in a temporary one; a
second build with the same folder takes seconds.

What this machine's pip is set up with (index, local wheels, certificates) is handed to the builds from outside.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "localhost/stand-in:bookworm"
NEEDED = ("buildah", "debootstrap", "crun", "unshare", "setpriv")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_LIMIT_S = 3000


class NoBase(Exception):
    """There is no Debian to build upon."""


def why_not() -> str | None:
    """Return why no image can be built here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install buildah debootstrap crun fuse-overlayfs"
    return None if os.geteuid() == 0 else "images are built by root here"


@functools.cache
def lab() -> Path:
    """Return the folder of everything, with buildah's settings in it."""
    folder = Path(os.environ.get("IMAGE_LAB") or tempfile.mkdtemp(prefix="image-lab-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder)
    return folder


def write_settings(folder: Path) -> None:
    """Have buildah keep everything in a folder."""
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    )


def buildah(*arguments: str) -> str:
    """Run buildah; return what it prints.

    Raises:
        RuntimeError: It failed; with the end of what it printed.
    """
    done = subprocess.run(
        ["buildah", *arguments],
        env=os.environ | {"CONTAINERS_STORAGE_CONF": str(lab() / "storage.conf")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"buildah {' '.join(arguments)}: code {done.returncode}\n{done.stdout[-5000:]}")
    return done.stdout


def clean() -> None:
    """Remove what the lab has mounted, and the lab itself unless it was asked for."""
    buildah("rm", "--all")
    subprocess.run(["umount", str(lab() / "store/overlay")], stderr=subprocess.DEVNULL)
    if not os.environ.get("IMAGE_LAB"):
        shutil.rmtree(lab())
        lab.cache_clear()


def build(dockerfile: str, tag: str, **arguments: str) -> str:
    """Build one Dockerfile of docker/ as Docker would, with build arguments; return what was printed."""
    make_base()
    options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    options += [f"--volume={path}:{inside}:ro" for path, inside in _pip_files().items()]
    return buildah(
        *("bud", "--isolation", "chroot", "--format", "docker", "--layers", "--pull-never", "--tag", tag, *options),
        *("--file", str(ROOT / "docker" / dockerfile), str(ROOT)),
    )


def make_base() -> None:
    """Make the stand-in for the base images, unless it is there.

    Raises:
        NoBase: Debian's archive cannot be reached.
    """
    if BASE in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return
    rootfs, context = lab() / "rootfs", lab() / "base"
    if not (rootfs / "usr").is_dir():
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(rootfs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
        if done.returncode:
            shutil.rmtree(rootfs, ignore_errors=True)
            raise NoBase(f"debootstrap: code {done.returncode}: {done.stdout[-500:]}")
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, rootfs / CERTIFICATES.relative_to("/"))
    context.mkdir(exist_ok=True)
    subprocess.run(["tar", "-C", rootfs, "--numeric-owner", "-cf", context / "rootfs.tar", "."], check=True)
    (context / "Dockerfile").write_text(
        "FROM scratch\nADD rootfs.tar /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )
    buildah("bud", "--isolation", "chroot", "--format", "docker", "--tag", BASE, str(context))
    (context / "rootfs.tar").unlink()


def _pip_files() -> dict[str, str]:
    """Files of this machine that pip reads, and where it finds them in a build: its settings, and local packages."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^[^=]*\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    settings = {key: value.replace("\\n", " ") for key, value in settings.items()}
    written = lab() / "pip.conf"
    written.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    paths = [Path(word) for key in ("find-links", "constraint") for word in settings.get(key, "").split()]
    # The pages of a local index name files beside it: ../../files/NAME.
    indexes = " ".join(settings.get(key, "") for key in ("index-url", "extra-index-url")).split()
    paths += [Path(url.removeprefix("file://")).parent for url in indexes if url.startswith("file://")]
    return {str(written): "/etc/pip.conf"} | {str(path): str(path) for path in paths if path.exists()}


def run(
    tag: str, *arguments: str, volume: Path, user: int, entrypoint: bool = True, limit_s: float = 600
) -> subprocess.CompletedProcess:
    """Run a container as `docker run --read-only --tmpfs /tmp:exec --user USER -v VOLUME:/workspace TAG ...` does.

    It is crun's, the runtime below podman: root is read-only, the id is in no list of users, capabilities and network
    are taken away, and of the environment there is what the image sets, which is no HOME.
    """
    settings = json.loads(buildah("inspect", "--type", "image", tag))["Docker"]["config"]
    container = buildah("from", "--pull-never", tag).strip()
    try:
        bundle = lab() / "bundles" / container
        bundle.mkdir(parents=True, exist_ok=True)
        process = {
            "user": {"uid": user, "gid": user},
            "args": [*((settings["Entrypoint"] or []) if entrypoint else []), *arguments],
            "env": settings["Env"],
            "cwd": settings["WorkingDir"],
            "noNewPrivileges": True,
        }
        specification = {
            "ociVersion": "1.0.0",
            "process": process,
            "root": {"path": buildah("mount", container).strip(), "readonly": True},
            "hostname": "container",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=64m"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]},
                {"destination": "/etc/hosts", "type": "bind", "source": f"{bundle}/hosts", "options": ["bind", "ro"]},
                {"destination": "/workspace", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]},
            ],
            "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]},
        }
        (bundle / "hosts").write_text("127.0.0.1 localhost container\n")
        (bundle / "config.json").write_text(json.dumps(specification))
        crun = f"crun --root {lab()}/crun --cgroup-manager=disabled run --bundle {bundle} {container}"
        # crun refuses a machine with control groups of both versions: let it see those of the second alone.
        alone = ["unshare", "--mount", "sh", "-c", f"mount -t cgroup2 none /sys/fs/cgroup && exec {crun}"]
        return subprocess.run(alone, capture_output=True, text=True, timeout=limit_s)
    finally:
        buildah("rm", container)
