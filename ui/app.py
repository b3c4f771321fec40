"""The playground: see in a browser what adapters do, compare, merge and train them.

    imgadapt ui --adapters ~/loras --open

All that it makes goes into --home. It answers this machine only; docs/playground.md says how to share it.
"""

import argparse
import getpass
import os
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # for imgadapt_ui, which lies beside this file

from imgadapt.cli import program  # noqa: E402 # after the path
from imgadapt.errors import ConfigError  # noqa: E402
from imgadapt.playground.serving import accounts  # noqa: E402
from imgadapt.playground.settings import Settings  # noqa: E402


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    home = args.home.expanduser().absolute()
    if args.add_user:
        password = os.environ.get("IMGADAPT_PASSWORD") or getpass.getpass(f"password of {args.add_user}: ")
        accounts.add(args.auth_file or home / "users", args.add_user, password)
        print(f"{args.auth_file or home / 'users'}: {args.add_user} may come in")
        return
    file = args.auth_file or (home / "users" if (home / "users").is_file() else None)
    known = accounts.found(file, os.environ.get("IMGADAPT_AUTH", "")) if not args.no_auth_i_know else None
    if known is None and not args.no_auth_i_know and (args.shared or not accounts.is_own(args.host)):
        raise ConfigError(
            f"{'--shared' if accounts.is_own(args.host) else f'others could reach {args.host}'}, and nobody would be "
            "asked for a password: add someone with "
            "`imgadapt ui --add-user NAME` (or set IMGADAPT_AUTH=NAME:PASSWORD), or say --no-auth-i-know"
        )
    settings = Settings(
        home=home,
        adapters=_folders(args.adapters, "--adapters"),
        models=_folders(args.models, "--models"),
        data=_folders(args.data, "--data"),
        base=args.base if args.base == "demo" or not Path(args.base).exists() else os.path.abspath(args.base),
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.precision or ("bf16" if torch.cuda.is_available() else "fp32"),
        shared=args.shared or (known is not None and len(known.all) > 1),
        hub=args.hub and not args.shared,
    )
    _run(args, settings, known)


def _run(args: argparse.Namespace, settings: Settings, known: accounts.Accounts | None) -> None:
    _surroundings(settings)
    from imgadapt_ui import page, server

    from imgadapt.playground.house import House
    from imgadapt.playground.serving.entrance import Entrance  # these need Gradio's packages
    from imgadapt.playground.serving.guard import Rules
    from imgadapt.playground.serving.sessions import Guests

    opened = server.listen(args.host, args.port)  # before what takes seconds
    house = House(settings)
    try:
        stores = settings.folder("uploads"), settings.folder("temporary")
        rules = Rules(hosts=args.allow_host, stores=stores, guests=Guests.kept_in(settings.home / ".secret"))
        entrance = Entrance(known) if known else None
        app = server.application(house, page.build(house), rules, entrance, page.look())
        port = opened.getsockname()[1]
        named = args.host if args.host not in ("0.0.0.0", "::") else "localhost"
        url = f"http://{f'[{named}]' if ':' in named else named}:{port}/"

        def ready() -> None:
            print(f"imgadapt ui: {url}\n  what it makes: {settings.home}\n  Ctrl-C ends it", flush=True)
            if args.open:
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        server.serve(app, opened, ready)
    finally:
        print("imgadapt ui: closing", flush=True)
        house.close()


def _surroundings(settings: Settings) -> None:
    """Gradio reads these when it is imported: no network, its files in the home. It serves what lies in the folder that
    it runs in, so that is an empty one.
    """
    temporary = settings.folder("temporary")
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(temporary),
        GRADIO_SSR_MODE="False",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    settings.home.chmod(0o700)
    os.chdir(settings.folder("empty"))


def _folders(given: Sequence[Path], flag: str) -> tuple[Path, ...]:
    for folder in given:
        if not folder.expanduser().is_dir():
            raise ConfigError(f"{flag} {folder}: there is no such folder")
    return tuple(folder.expanduser().absolute() for folder in given)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: a number from 0 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--home", type=Path, default=Path("~/imgadapt"), help="folder for all that it writes [~/imgadapt]")
    add("--adapters", type=Path, nargs="+", default=[], metavar="DIR", help="folders of adapters")
    add("--models", type=Path, nargs="+", default=[], metavar="DIR", help="folders of bases")
    add("--data", type=Path, nargs="+", default=[], metavar="DIR", help="folders of pictures to train on")
    add("--base", default="demo", help="'demo', a diffusers folder, or a checkpoint; the first that is loaded [demo]")
    add("--device", help="[cuda where there is one, else cpu]")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the base [bf16 on cuda, else fp32]")
    add("--hub", action="store_true", help="bases named owner/name may be taken out of the hub's cache")
    add("--open", action="store_true", help="open it in the browser")
    add("--host", default="127.0.0.1", help="address to listen at [127.0.0.1: this machine only]")
    add("--port", type=_port, default=7860, help="0: any that is free [7860]")
    add("--allow-host", nargs="+", default=[], metavar="NAME", help="names that others call this machine by")
    add("--shared", action="store_true", help="several people: each sees their own pictures only")
    add("--auth-file", type=Path, metavar="FILE", help="who may come in [HOME/users, if it is there]")
    add("--add-user", metavar="NAME", help="write a name and its password into that file, and end")
    add("--no-auth-i-know", action="store_true", help="let everyone in who reaches the address")
    return parser


if __name__ == "__main__":
    program(main, sys.argv[1:])
