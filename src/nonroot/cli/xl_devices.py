"""Verbs for a domain's devices: block-*, cd-*, network-*."""

from pathlib import Path

import click

from nonroot.cli.display import domain_argument, json_option
from nonroot.cli.xl_common import act, find, print_json, print_table, refuse
from nonroot.errors import BadOptionError

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

NO_HOTPLUG = "disks cannot be added or taken away while it runs: that needs paravirtual disks, which nonroot lacks yet"
NO_NETWORK = "nonroot's guests have no network yet"


@click.command("block-list", short_help="List a domain's disks.", epilog="\b\nExample:\n  nonroot block-list web")
@json_option
@domain_argument
def block_list(domain: str, as_json: bool) -> int:
    """List DOMAIN's disks and CD-ROM drives, and the images in them. All are emulated: no rings, no event channels."""
    found = find(domain)
    disks = found.get("disks", [])
    if as_json:
        print_json(disks)
        return 0
    rows = [("Vdev", "BE", "Type", "Access", "Format", "Target")]
    for disk in disks:
        kind = "cdrom" if disk["cdrom"] else "disk"
        rows.append((disk["vdev"], "0", kind, disk["access"], disk["format"], disk["target"] or "(empty)"))
    print_table(rows)
    return 0


@click.command("block-attach", short_help="Add a disk to a domain.", epilog="\b\nNot possible yet; it says why.")
@domain_argument
@click.argument("disk", metavar="DISK-SPEC", nargs=-1, required=True)
def block_attach(domain: str, disk: tuple[str, ...]) -> int:
    """Add a disk (format=raw,vdev=xvdb,target=…) to DOMAIN while it runs."""
    from nonroot.toolstack.disks import parse_disk

    parse_disk(",".join(disk), Path.cwd())
    return refuse(domain, NO_HOTPLUG)


@click.command("block-detach", short_help="Take a disk from a domain.", epilog="\b\nNot possible yet; it says why.")
@click.option("--force", is_flag=True, help="Without asking the guest.")
@domain_argument
@click.argument("vdev", metavar="VDEV")
def block_detach(force: bool, domain: str, vdev: str) -> int:
    """Take the disk VDEV from DOMAIN while it runs."""
    return refuse(domain, NO_HOTPLUG)


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
    """List DOMAIN's network interfaces: none, yet."""
    find(domain)
    if as_json:
        print_json([])
    else:
        print_table([("Idx", "BE", "Mac Addr.", "handle", "state", "evt-ch", "tx-/rx-ring-ref", "BE-path")])
    return 0


@click.command(
    "network-attach", short_help="Add a network interface to a domain.", epilog="\b\nNot possible yet; it says why."
)
@domain_argument
@click.argument("vif", metavar="[VIF-SPEC]", nargs=-1)
def network_attach(domain: str, vif: tuple[str, ...]) -> int:
    """Add a network interface to DOMAIN while it runs."""
    return refuse(domain, NO_NETWORK)


@click.command(
    "network-detach", short_help="Take a network interface away.", epilog="\b\nNot possible yet; it says why."
)
@domain_argument
@click.argument("device", metavar="DEVID|MAC")
def network_detach(domain: str, device: str) -> int:
    """Take a network interface from DOMAIN while it runs."""
    return refuse(domain, NO_NETWORK)
