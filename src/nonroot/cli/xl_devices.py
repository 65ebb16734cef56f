"""Verbs for a domain's devices: block-*, cd-*, network-*."""

from pathlib import Path
from typing import Any

import click

from nonroot.cli.display import domain_argument, json_option
from nonroot.cli.xl_common import act, ask, find, print_json, print_table
from nonroot.errors import BadOptionError, NotRunningError

__all__ = [
    "block_attach",
    "block_detach",
    "block_list",
    "cd_eject",
    "cd_insert",
    "network_attach",
    "network_detach",
    "network_list",
]


@click.command("block-list", short_help="List a domain's disks.", epilog="\b\nExample:\n  nonroot block-list web")
@json_option
@domain_argument
def block_list(domain: str, as_json: bool) -> int:
    """List DOMAIN's disks and CD-ROM drives, and the images in them. Those with a state are Xen's.

    A disk of a PC is an emulated one, and Xen's is `initialising`, until the guest unplugs the emulated one.
    """
    live = ask(domain, "block-list")["disks"]
    names = {one["vdev"] for one in live}
    disks = [disk for disk in find(domain).get("disks", []) if disk["vdev"] not in names]
    for one in live:
        disk = {"vdev": one["vdev"], "target": one["image"], "format": one["format"], "cdrom": one["cdrom"]}
        disks.append(
            disk | {"access": "r" if one["read_only"] else "w", "state": one["state"], "backend": one["backend"]}
        )
    if as_json:
        print_json(disks)
        return 0
    rows = [("Vdev", "BE", "Type", "Access", "State", "Format", "Target")]
    for disk in disks:
        kind = "cdrom" if disk["cdrom"] else "disk"
        target = disk["target"] or "(empty)"
        rows.append((disk["vdev"], "0", kind, disk["access"], disk.get("state", "-"), disk["format"], target))
    print_table(rows)
    return 0


@click.command(
    "block-attach",
    short_help="Add a disk to a domain.",
    epilog="\b\nExample:\n  nonroot block-attach web format=qcow2,vdev=xvdb,access=w,target=data.qcow2",
)
@json_option
@domain_argument
@click.argument("disk", metavar="DISK-SPEC", nargs=-1, required=True)
def block_attach(domain: str, disk: tuple[str, ...], as_json: bool) -> int:
    """Add a disk (format=raw,vdev=xvdb,target=…) to DOMAIN, which has to be a Xen domain, while it runs.

    It is still there when DOMAIN is started again.
    """
    from nonroot.toolstack.disks import parse_disk

    spec = parse_disk(",".join(disk), Path.cwd())
    if spec.is_cd and not spec.target:
        raise BadOptionError("name the image")
    facts = {"drive": spec.drive(), "vdev": spec.vdev, "cdrom": spec.is_cd, "disk": spec.to_wire()}
    return _change(domain, "block_attach", as_json, **facts)


@click.command(
    "block-detach", short_help="Take a disk from a domain.", epilog="\b\nExample:\n  nonroot block-detach web xvdb"
)
@json_option
@domain_argument
@click.argument("vdev", metavar="VDEV")
def block_detach(domain: str, vdev: str, as_json: bool) -> int:
    """Ask DOMAIN's guest to let go of the disk VDEV; it is gone when the guest has."""
    names = [one["vdev"] for one in ask(domain, "block-list")["disks"]]
    if vdev not in names:
        there = f"there are: {', '.join(names)}" if names else "there is none"
        raise NotRunningError(f"{domain[:60]} has no disk of Xen's {vdev[:40]!r}; {there}")
    return _change(domain, "block_detach", as_json, vdev=vdev)


@click.command(
    "cd-insert",
    short_help="Put a CD into a domain's drive.",
    epilog="\b\nExample:\n  nonroot cd-insert web hdc debian.iso",
)
@json_option
@domain_argument
@click.argument("vdev", metavar="VDEV")
@click.argument("image", metavar="IMAGE")
def cd_insert(domain: str, vdev: str, image: str, as_json: bool) -> int:
    """Put IMAGE into DOMAIN's CD-ROM drive VDEV, instead of what is in there."""
    from nonroot.toolstack.disks import parse_disk

    if "," in image or image.startswith("target="):
        text = image if "vdev=" in image else f"vdev={vdev},{image}"
        disk = parse_disk(f"devtype=cdrom,{text}", Path.cwd())
    else:
        disk = parse_disk(f"devtype=cdrom,format=raw,vdev=hdc,target={image}", Path.cwd())
    if not disk.target:
        raise BadOptionError("name the image to insert; cd-eject empties a drive")
    return act("medium", domain, as_json, vdev=vdev, disk={"target": disk.target, "drive": disk.drive()})


@click.command(
    "cd-eject", short_help="Take the CD out of a domain's drive.", epilog="\b\nExample:\n  nonroot cd-eject web hdc"
)
@click.option("--force", is_flag=True, help="Even if the guest has locked the drive.")
@json_option
@domain_argument
@click.argument("vdev", metavar="VDEV")
def cd_eject(force: bool, domain: str, vdev: str, as_json: bool) -> int:
    """Take the CD out of DOMAIN's CD-ROM drive VDEV. A guest that has mounted it keeps the drive locked."""
    return act("medium", domain, as_json, vdev=vdev, disk=None, force=force)


@click.command(
    "network-list", short_help="List a domain's network interfaces.", epilog="\b\nExample:\n  nonroot network-list web"
)
@json_option
@domain_argument
def network_list(domain: str, as_json: bool) -> int:
    """List DOMAIN's network interfaces."""
    cards = ask(domain, "network-list")["networks"]
    if as_json:
        print_json(cards)
        return 0
    rows = [("Idx", "BE", "Mac Addr.", "State", "Network", "BE-path")]
    rows += [(str(one["index"]), "0", one["mac"], one["state"], one["network"], one["backend"]) for one in cards]
    print_table(rows)
    return 0


@click.command(
    "network-attach",
    short_help="Add a network interface to a domain.",
    epilog="\b\nExamples:\n  nonroot network-attach web\n  nonroot network-attach web bridge=lan mac=00:16:3e:12:34:56",
)
@json_option
@domain_argument
@click.argument("vif", metavar="[VIF-SPEC]", nargs=-1)
def network_attach(domain: str, vif: tuple[str, ...], as_json: bool) -> int:
    """Add a network interface to DOMAIN while it runs. bridge= names a private network; without it: the user's."""
    from nonroot.toolstack.vifs import parse_vif

    return _change(domain, "network_attach", as_json, network=parse_vif(",".join(vif)))


@click.command(
    "network-detach",
    short_help="Take a network interface away.",
    epilog="\b\nExample:\n  nonroot network-detach web 0",
)
@json_option
@domain_argument
@click.argument("device", metavar="DEVID|MAC")
def network_detach(domain: str, device: str, as_json: bool) -> int:
    """Ask DOMAIN's guest to let go of a network interface; it is gone when the guest has."""
    cards = ask(domain, "network-list")["networks"]
    index = next((one["index"] for one in cards if device.lower() in (str(one["index"]), one["mac"].lower())), None)
    if index is None:
        there = ", ".join(str(one["index"]) for one in cards)
        there = f"there are: {there}" if there else "there is none"
        raise NotRunningError(f"{domain[:60]} has no network interface {device[:40]!r}; {there}")
    return _change(domain, "network_detach", as_json, index=index)


def _change(domain: str, method: str, as_json: bool, **params: Any) -> int:
    """Have domain zero change a device, which then is as it was told also when the domain is started again."""
    from nonroot.toolstack.client import Toolstack

    with Toolstack() as toolstack:
        done = toolstack.request(method, domain=domain, **params)
    if as_json:
        print_json({"domain": domain, "done": method} | done)
    return 0
