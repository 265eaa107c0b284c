"""The commands ``serve`` and ``label``, which start a server."""

from __future__ import annotations

import ipaddress
import sys
import webbrowser
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import command, grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import note, say
from retrieval_tip.cli.opening import inputs_of, reader_for, store_of, with_joined
from retrieval_tip.cli.options import BackboneOptions, EncodingOptions, OpeningOptions
from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.wording import counted, show


@command()
def serve_command(
    folders: tuple[Place, ...] = argument(kinds.INDEX, nargs=-1, metavar="[INDEX...]"),
    host: str = option(default="127.0.0.1"),
    port: int = option(click.IntRange(0, 65535), default=8000),
    token: str | None = option(envvar="RETRIEVAL_TIP_TOKEN", show_envvar=True),
    read_only: bool = flag(),
    private: bool = flag(),
    uploads: Path | None = option(kinds.FOLDER),
    into: Path | None = option(kinds.FOLDER, "--out", "-o"),
    model: str | None = option(metavar="NAME"),
    root: Path | None = option(kinds.FOLDER),
    allow_host: tuple[str, ...] = option(multiple=True, metavar="NAME"),
    trusted_proxy: tuple[str, ...] = option(multiple=True, metavar="ADDRESS"),
    backbone: BackboneOptions = grouped(BackboneOptions, without=("model",)),
    opening: OpeningOptions = grouped(OpeningOptions, without=("where",)),
) -> None:
    """Serve indexes as a web page and an HTTP API.

    If you give no INDEX, you can create the first one in the page. The server detects new versions of its indexes.
    Use Ctrl+C or SIGTERM to stop it cleanly.

    Options:
        host: Address to listen on. Without --private, anyone who can reach it can view the indexes.
        port: Port to listen on. Use 0 to select a free port.
        token: Secret token required to change indexes. [default: on localhost, a token that is part of the printed URL
            and is kept for the next server on this port; on other addresses, no token, and changes are refused]
        read_only: Refuse all changes.
        private: Require the token for all requests. If you give no token, one is printed.
        uploads: Folder for added images. [default: INDEX-shots, next to each INDEX]
        into: Folder for indexes that are created in the page. [default: next to the first INDEX]
        model: Encoder for indexes that are created in the page. [default: the encoder of the first INDEX, or ViT-B-32]
        root: Folder that contains the relative paths of shots, and the local files of Label Studio.
        allow_host: Additional host name that requests may use. [default: only localhost, or any name if --host is
            another address]
        trusted_proxy: Address or network of a proxy that names its clients in X-Forwarded-For.

    Examples:
        serve indexes/things
        serve indexes/things indexes/others --port 0 --token secret
    """
    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.guard import Limits
    from retrieval_tip.server.run import LOOPBACK, LastServer, address, is_local, listen, serve
    from retrieval_tip.server.served import Backbones, Maker, open_all
    from retrieval_tip.server.service import Service

    _check_access(token, read_only and not private, trusted_proxy)
    backbones = Backbones(backbone.device, backbone.precision, opening.verify)
    with listen(host, port) as listening:
        here = is_local(listening)
        kept = LastServer("serve", folders or [into or Path("indexes")])
        key = (
            kept.token_for(listening)
            if token is None and (private or (here and not read_only))
            else token
        )
        hosts = LOOPBACK | {name.lower() for name in allow_host} if allow_host or here else None
        maker = None
        if model is not None or not folders:
            maker = Maker(into or Path("indexes"), cache(partial(backbones.load, model)), backbones)
        elif into is not None:
            raise UsageError("--out: needs --model when an INDEX is given; add --model NAME")
        served = open_all(folders, backbones)
        if maker is not None and model is not None:
            maker.load()  # fails before the page opens
        named = (f"{name} ({counted(entry.now.index.n, 'shot')})" for name, entry in served.items())
        what = ", ".join(named) or "no index yet"
        at = address(listening)
        opened = ""
        if key != token:
            use = "view" if read_only else "view and change"
            opened = f" open {at}/#token={key} to {use} it;"
        ready = partial(say, f"Serving {what} at {at};{opened} Ctrl+C stops the server")
        service = Service(served, Limits(hosts=hosts), uploads, root, maker)
        token_of_changes = None if read_only else key
        token_of_answers = key if private else None
        app = create_app(service, token=token_of_changes, private=token_of_answers, ready=ready)
        serve(app, listening, trusted_proxy)


@command()
def label_command(
    photos: tuple[str, ...] = options.PHOTOS,
    out: Place = option(kinds.INDEX, "--out", "-o", required=True, metavar="INDEX"),
    classes: list[str] = option(multiple=True, metavar="NAME,...", callback=kinds.names),
    port: int | None = option(click.IntRange(0, 65535)),
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Label photos in the browser, most useful photos first.

    PHOTOS are images, folders, globs or tables of paths. Use - to read paths from standard input. The page shows the
    photos that help most, with a guess for each. You can add classes in the page. Every label is saved in INDEX, so
    you can stop with Ctrl+C and continue later.

    Options:
        out: Index that stores the labels. The first label creates it.
        classes: Class names, separated by commas. An encoder with text can guess them before photos are labelled.
        port: Port to listen on. Use 0 to select a free port. [default: the last port of INDEX, or a free port]

    Examples:
        label new --out indexes/things
        label new --out indexes/animals --classes cat,dog,owl
    """
    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.guard import Limits
    from retrieval_tip.server.run import LOOPBACK, LastServer, address, listen, serve
    from retrieval_tip.server.served import Backbones, Maker, open_all
    from retrieval_tip.server.service import Service
    from retrieval_tip.server.session import Labelling, paths_of

    sources = inputs_of(photos, needed=True)
    store = store_of(out)
    paths = paths_of(sources)
    exists = store.exists()
    manifest = store.manifest() if exists else None
    opened = reader_for(manifest, sources, with_joined(manifest, encoding))
    kept = LastServer("label", [out])
    with (
        opened as reader,
        kept.listen("127.0.0.1") if port is None else listen("127.0.0.1", port) as listening,
    ):
        labelling = Labelling(out, paths, reader, classes)
        backbone = reader.backbone
        assert backbone is not None
        backbones = Backbones(encoding.device, encoding.precision, None, backbone)
        maker = Maker((store.local or Path("indexes/new")).parent, lambda: backbone, backbones)
        served = open_all([out] if exists else [], backbones)
        token = kept.token_for(listening)
        url = f"{address(listening)}/#token={token}"

        def ready() -> None:
            what = counted(len(labelling.photos), "photo")
            say(
                f"Label {what} at {url}; the labels are saved in {show(str(out))}; Ctrl+C stops the server"
            )
            if sys.stderr.isatty():
                webbrowser.open(url)

        service = Service(served, Limits(hosts=LOOPBACK), maker=maker)
        serve(
            create_app(service, token=token, private=token, labelling=labelling, ready=ready),
            listening,
        )
        note(
            "Labelled photos: {labelled:,} of {photos:,}; {others}".format_map(
                labelling.status()
            ).rstrip("; ")
        )
        labelling.check_saved()


def _check_access(token: str | None, is_useless: bool, trusted_proxy: Sequence[str]) -> None:
    if token is not None and (not token.strip() or not token.isascii() or not token.isprintable()):
        raise UsageError(
            "--token: must consist of printable ASCII characters; give another token or omit the option"
        )
    if token is not None and is_useless:
        raise UsageError("--token and --read-only: give only one, or add --private")
    for proxy in trusted_proxy:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise UsageError(
                f"--trusted-proxy {proxy}: is not an address or network; give one such as 10.0.0.7 or 10.0.0.0/8"
            ) from None
