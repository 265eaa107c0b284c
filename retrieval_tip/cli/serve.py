"""The commands ``serve`` and ``label``, which start a server."""

from __future__ import annotations

import dataclasses
import ipaddress
import secrets
import sys
import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import say
from retrieval_tip.cli.opening import Origin, encoder_for, encoder_of, load
from retrieval_tip.cli.options import DEVICE, PRECISION, VERIFY, EncodingOptions, several
from retrieval_tip.cli.parameters import FOLDER, INDEX, Number, count
from retrieval_tip.cli.stdin import paths_on_stdin
from retrieval_tip.errors import UsageError, counted, install, show

if TYPE_CHECKING:
    from retrieval_tip.index.places import Place
    from retrieval_tip.settings import Precision, Verify


_LIMITS = several(
    click.option("--max-bytes", type=count(), default=32 << 20, show_default=True,
                 help="Maximum size of a request, in bytes."),
    click.option("--max-pixels", type=count(), default=50_000_000, show_default=True,
                 help="Maximum size of an image, in pixels."),
    click.option("--queue", type=count("queue"), default=256, show_default=True,
                 help="Size of the queue, in images. A client that fills more than a quarter is refused with status "
                      "429. A large image counts several times, and 16 features count once."),
    click.option("--timeout", type=Number(0.1, 86_400), default=30.0, show_default=True, metavar="SECONDS",
                 help="Time limit for a response."),
)  # fmt: skip


_ACCESS = several(
    click.option("--host", default="127.0.0.1", show_default=True,
                  help="Address to listen on. Without --private, anyone who can reach it can view the indexes."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
                 help="Port to listen on. Use 0 to select a free port."),
    click.option("--token", envvar="RETRIEVAL_TIP_TOKEN", show_envvar=True,
                  help="Secret token required to change indexes.  [default: on localhost, a new token, which is part "
                       "of the printed URL; on other addresses, no token, and changes are refused]"),
    click.option("--read-only", is_flag=True, help="Refuse all changes."),
    click.option("--private", is_flag=True,
                  help="Require the token for all requests. If you give no token, a new one is printed."),
    click.option("--uploads", type=FOLDER,
                  help="Folder in which added images are stored.  [default: INDEX-shots, next to each INDEX]"),
    click.option("--into", type=FOLDER,
                  help="Folder for indexes that are created in the page.  [default: next to the first INDEX]"),
    click.option("--model", metavar="NAME",
                  help="Encoder for indexes that are created in the page.  [default: the encoder of the first INDEX, "
                       "or ViT-B-32]"),
    click.option("--pretrained", metavar="TAG", help="Weights to load for --model."),
    click.option("--root", type=FOLDER, help="Folder against which the relative paths of shots are resolved."),
    click.option("--allow-host", "hosts", multiple=True, metavar="NAME",
                  help="Additional host name that requests may use. Can be repeated.  "
                       "[default: only localhost, or any name if --host is another address]"),
    click.option("--trusted-proxy", "proxies", multiple=True, metavar="ADDRESS",
                  help="Address or network of a proxy that names its clients in X-Forwarded-For. Can be repeated."),
)  # fmt: skip


@command("serve")
@click.argument("folders", type=INDEX, nargs=-1, metavar="[INDEX...]")
@_ACCESS
@_LIMITS
@PRECISION
@VERIFY
@DEVICE
def serve_command(
    folders: tuple[Place, ...],
    host: str,
    port: int,
    token: str | None,
    read_only: bool,
    private: bool,
    uploads: Path | None,
    into: Path | None,
    model: str | None,
    pretrained: str | None,
    root: Path | None,
    hosts: tuple[str, ...],
    proxies: tuple[str, ...],
    max_bytes: int,
    max_pixels: int,
    queue: int,
    timeout: float,
    precision: Precision,
    verify: Verify | None,
    device: str,
) -> None:
    """Serve indexes as a web page and an HTTP API.

    If you give no INDEX, you can create the first one in the page. While the server is running, it detects new versions
    of its indexes. Use Ctrl+C or SIGTERM to stop the server cleanly. The server needs the extra serve.
    """
    _check_installed("serve")
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.limits import Limits
    from retrieval_tip.server.run import LOOPBACK, address, listen, serve
    from retrieval_tip.server.served import Backbones, Maker, open_all

    if token is not None and (not token.strip() or not token.isascii() or not token.isprintable()):
        raise UsageError("--token: must consist of printable ASCII characters; give another token or omit the option")
    if token is not None and read_only and not private:
        raise UsageError("--token and --read-only: give only one, or add --private")
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise UsageError(
                f"--trusted-proxy {proxy}: is not an address or network; give one such as 10.0.0.7 or 10.0.0.0/8"
            ) from None
    limits = Limits(bytes=max_bytes, pixels=max_pixels, queue=queue, seconds=timeout)
    with listen(host, port) as listening:
        here = listening.getsockname()[0].startswith(("127.", "::1"))
        made = secrets.token_urlsafe(16) if token is None and (private or (here and not read_only)) else None
        key = token or made
        if hosts or here:
            limits = dataclasses.replace(limits, hosts=LOOPBACK | {name.lower() for name in hosts})
        served = open_all(folders, device, precision, verify)
        maker = None
        if model is not None or not folders:
            backbone = load_backbone(model, pretrained, device=device, precision=precision)
            maker = Maker(into or Path("indexes"), backbone, Backbones(device, precision, verify, backbone))
        elif into is not None:
            raise UsageError("--into: needs --model when an INDEX is given; add --model NAME")
        named = (f"{name} ({counted(one.now.cache.n, 'shot')})" for name, one in served.items())
        what = ", ".join(named) or "no index yet"
        at = address(listening)
        opened = f" open {at}/#token={made} to view{'' if read_only else ' and change'} it;" if made else ""
        ready = partial(say, f"Serving {what} at {at};{opened} Ctrl+C stops the server")
        app = create_app(
            served, limits, token=None if read_only else key, private=key if private else None, uploads=uploads,
            root=root, maker=maker, ready=ready,
        )  # fmt: skip
        serve(app, listening, timeout, proxies)


@command("label")
@click.argument("photos", nargs=-1, required=True)
@click.option("--into", "folder", type=INDEX, required=True, metavar="INDEX",
              help="Index that stores the labels. The first label creates it.")  # fmt: skip
@click.option("--classes", default="", metavar="NAME,...",
              help="Class names, separated by commas. You can add others in the page.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default="a free port",
              help="Port to listen on.")  # fmt: skip
@options.BACKBONE
@options.ENCODING
@click.pass_context
def label_command(
    ctx: click.Context, photos: tuple[str, ...], folder: Place, classes: str, port: int, encoding: EncodingOptions
) -> None:
    """Label photos in the browser, most useful photos first.

    PHOTOS are images, folders, globs or tables of paths. Use - to read paths from standard input. The page shows the
    photos that help most, with a guess for each. Every label is saved in INDEX, so you can stop with Ctrl+C and
    continue later. The page needs the extra serve.
    """
    _check_installed("label")
    from retrieval_tip.data.sources import open_inputs
    from retrieval_tip.index.places import at
    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.labelling import Labelling
    from retrieval_tip.server.limits import Limits
    from retrieval_tip.server.run import LOOPBACK, address, listen, serve
    from retrieval_tip.server.served import Backbones, Maker, Served

    sources = list(open_inputs(photos, paths_on_stdin()))
    known = at(folder).exists()
    opened = (
        encoder_for(ctx, Origin.of(folder), sources, encoding) if known else encoder_of(ctx, load(encoding), encoding)
    )
    with opened as encoder, listen("127.0.0.1", port) as listening:
        names = [name for name in map(str.strip, classes.split(",")) if name]
        labelling = Labelling(folder, sources, encoder, names)
        assert encoder.backbone is not None
        backbones = Backbones(encoding.device, encoding.precision, None, encoder.backbone)
        maker = Maker((at(folder).local or Path("indexes/new")).parent, encoder.backbone, backbones)
        served = [Served(folder, backbones)] if known else []
        token = secrets.token_urlsafe(16)
        url = f"{address(listening)}/#token={token}"

        def ready() -> None:
            what = counted(len(labelling.photos), "photo")
            say(f"Label {what} at {url}; the labels are saved in {show(str(folder))}; Ctrl+C stops the server")
            if sys.stderr.isatty():
                webbrowser.open(url)

        app = create_app(
            {one.name: one for one in served}, Limits(hosts=LOOPBACK), token=token, private=token, maker=maker,
            labelling=labelling, ready=ready,
        )  # fmt: skip
        serve(app, listening, Limits.seconds)
        labelling.check_saved()


def _check_installed(name: str) -> None:
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(f"{name}: FastAPI and uvicorn are not installed; run {install('serve')}") from None
