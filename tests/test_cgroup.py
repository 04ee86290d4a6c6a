# SPDX-License-Identifier: MIT
"""Units and containers from the text of /proc/PID/cgroup."""

from __future__ import annotations

import pytest

from ksmtool.cgroup import Place, place
from machines import ID, POD, SHORT

POD_ = POD.replace("-", "_")
V1 = "12:pids:{0}\n9:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:{1}\n0::{2}\n"
USER = "/user.slice/user-1000.slice/user@1000.service"

PATHS = {
    "a service": ("/system.slice/nginx.service", "nginx.service", ""),
    "a template": (
        "/system.slice/system-getty.slice/getty@tty1.service",
        "getty@tty1.service",
        "",
    ),
    "a group below a service": (
        "/system.slice/systemd-udevd.service/udev",
        "systemd-udevd.service",
        "",
    ),
    "a login": ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", ""),
    "a user's service": (
        f"{USER}/app.slice/foo.service",
        "foo.service of user 1000",
        "",
    ),
    "a desktop's program": (
        rf"{USER}/app.slice/app-gnome-firefox\x2desr-2345.scope",
        r"app-gnome-firefox\x2desr-2345.scope of user 1000",
        "",
    ),
    "the user's manager": (f"{USER}/init.scope", "init.scope of user 1000", ""),
    "letters beyond ASCII": (
        r"/system.slice/caf\xc3\xa9.service",
        r"caf\xc3\xa9.service",
        "",
    ),
    "a name that systemd had to escape": (
        "/system.slice/_cpu.service",
        "cpu.service",
        "",
    ),
    "a service that is gone": ("/system.slice/old.service (deleted)", "old.service", ""),
    "above the namespace": ("/../../system.slice/cron.service", "cron.service", ""),
    "nowhere": ("/", "", ""),
    "a slice is no unit of a process": ("/system.slice", "", ""),
    "Docker with systemd": (
        f"/system.slice/docker-{ID}.scope",
        f"docker-{ID}.scope",
        f"docker:{SHORT}",
    ),
    "Docker without": (f"/docker/{ID}", "", f"docker:{SHORT}"),
    "Docker's own service": ("/system.slice/docker.service", "docker.service", ""),
    "Docker's builder": ("/docker/buildkit/x1y2z3", "", ""),
    "rootless Docker": (
        f"{USER}/user.slice/docker-{ID}.scope",
        f"docker-{ID}.scope of user 1000",
        f"docker:{SHORT}",
    ),
    "Podman": (
        f"/machine.slice/libpod-{ID}.scope/container",
        f"libpod-{ID}.scope",
        f"podman:{SHORT}",
    ),
    "Podman's quadlet": (
        f"/system.slice/web.service/libpod-payload-{ID}",
        "web.service",
        f"podman:{SHORT}",
    ),
    "Podman without systemd": (f"/libpod_parent/libpod-{ID}", "", f"podman:{SHORT}"),
    "Podman's monitor": (
        f"/machine.slice/libpod-conmon-{ID}.scope",
        f"libpod-conmon-{ID}.scope",
        "",
    ),
    "LXC": ("/lxc.payload.web/init.scope", "init.scope in lxc:web", "lxc:web"),
    "LXC 3": ("/lxc/web", "", "lxc:web"),
    "LXC on Proxmox VE": (
        "/lxc/101/ns/system.slice/ssh.service",
        "ssh.service in lxc:101",
        "lxc:101",
    ),
    "LXC's monitor": ("/lxc.monitor.web", "", ""),
    "Incus, a project": (
        "/lxc.payload.shop_db1/system.slice/mariadb.service",
        "mariadb.service in lxc:shop_db1",
        "lxc:shop_db1",
    ),
    "nspawn, started by hand": (
        r"/machine.slice/machine-build\x2d1.scope/payload",
        r"machine-build\x2d1.scope",
        "nspawn:build-1",
    ),
    "nspawn, its service": (
        "/machine.slice/systemd-nspawn@arch.service/payload/system.slice/sshd.service",
        "sshd.service in nspawn:arch",
        "nspawn:arch",
    ),
    "a virtual machine is no container": (
        r"/machine.slice/machine-qemu\x2d3\x2dwin.scope/libvirt/emulator",
        r"machine-qemu\x2d3\x2dwin.scope",
        "",
    ),
    "a virtual machine on Proxmox VE": ("/qemu.slice/100.scope", "100.scope", ""),
    "LXC by libvirt": (
        r"/machine.slice/machine-lxc\x2d55\x2dbox.scope",
        r"machine-lxc\x2d55\x2dbox.scope",
        "lxc:box",
    ),
    "Kubernetes, containerd": (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/"
        f"cri-containerd-{ID}.scope",
        f"cri-containerd-{ID}.scope",
        f"kubernetes:{SHORT}",
    ),
    "Kubernetes, CRI-O": (
        f"/kubepods.slice/kubepods-pod{POD_}.slice/crio-{ID}.scope/container",
        f"crio-{ID}.scope",
        f"kubernetes:{SHORT}",
    ),
    "Kubernetes, CRI-O's monitor": (
        f"/kubepods.slice/kubepods-pod{POD_}.slice/crio-conmon-{ID}.scope",
        f"crio-conmon-{ID}.scope",
        "",
    ),
    "Kubernetes, Docker": (
        f"/kubepods.slice/kubepods-pod{POD_}.slice/docker-{ID}.scope",
        f"docker-{ID}.scope",
        f"kubernetes:{SHORT}",
    ),
    "Kubernetes without systemd": (
        f"/kubepods/besteffort/pod{POD}/{ID}",
        "",
        f"kubernetes:{SHORT}",
    ),
    "Kubernetes, drivers that differ": (
        f"/system.slice/containerd.service/kubepods-burstable-pod{POD_}.slice:cri-containerd:{ID}",
        "containerd.service",
        f"kubernetes:{SHORT}",
    ),
    "Kubernetes in Docker": (
        f"/docker/{'ab' * 32}/kubelet/kubepods/burstable/pod{POD}/{ID}",
        "",
        f"kubernetes:{SHORT}",
    ),
    "nerdctl": (
        f"/system.slice/nerdctl-{ID}.scope",
        f"nerdctl-{ID}.scope",
        f"containerd:{SHORT}",
    ),
    "a whole system in Docker": (
        f"/system.slice/docker-{ID}.scope/system.slice/nginx.service",
        f"nginx.service in docker:{SHORT}",
        f"docker:{SHORT}",
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_cgroup_v2(name: str) -> None:
    path, unit, container = PATHS[name]
    assert place(f"0::{path}\n") == Place(unit, container)


@pytest.mark.parametrize("name", PATHS)
def test_hybrid_has_it_twice(name: str) -> None:
    path, unit, container = PATHS[name]
    assert place(V1.format(path, path, path)) == Place(unit, container)


@pytest.mark.parametrize("name", PATHS)
def test_cgroup_v1_has_units_in_one_hierarchy_and_containers_in_all(name: str) -> None:
    path, unit, container = PATHS[name]
    assert place(V1.format("/", path, "/")) == Place(unit, container)
    assert place(V1.format(path, "/", "/")).container == container


def test_a_controller_does_not_hide_the_unit() -> None:
    """On cgroup v1 what has no limit of its own is higher up in that hierarchy."""
    text = V1.format("/system.slice", "/system.slice/cron.service", "/")
    assert place(text) == Place("cron.service", "")
    # As of a user's manager, to which pids and memory may be delegated.
    text = V1.format(USER, f"{USER}/app.slice/foo.service", "/")
    assert place(text) == Place("foo.service of user 1000", "")


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "0::\n", "1:2\n", "0::/\n"])
def test_what_says_nothing(text: str) -> None:
    assert place(text) == Place()
