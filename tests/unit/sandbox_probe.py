"""What the sandbox's tests run in the child process. Standard library only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def attempt(what: Callable[[], object]) -> str:
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "succeeded"


def connect(family: int, kind: int, address: object) -> None:
    with socket.socket(family, kind) as stream:
        stream.settimeout(2)
        stream.connect(address)
        stream.send(b"?")


def fail_or_wait(end: str) -> None:
    """After what takes longer than the parent needs to see it, or at once."""
    if end == "fail":
        raise ValueError("the reason")
    if end == "wait":
        time.sleep(600)


def main(action: str, *arguments: str) -> None:
    match action:
        case "environment":
            Path("environment.json").write_text(json.dumps(dict(os.environ)))
        case "network":
            port, unix = int(arguments[0]), arguments[1]
            found = {
                "tcp": attempt(lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))),
                "udp": attempt(lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53))),
                "unix": attempt(lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, unix)),
                "abstract": attempt(lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{unix}")),
            }
            Path("found.json").write_text(json.dumps(found))
        case "files":
            outside, readable = Path(arguments[0]), Path(arguments[1])
            found = {
                "read": attempt((outside / "secret").read_bytes),
                "list": attempt(lambda: os.listdir(outside)),
                "write": attempt(lambda: (outside / "new").write_text("")),
                "overwrite": attempt(lambda: (outside / "secret").write_text("")),
                "remove": attempt((outside / "secret").unlink),
                "through a link": attempt(lambda: (Path("link").symlink_to(outside / "secret"), Path("link").read_bytes())),
                "read what is given": attempt((readable / "model").read_bytes),
                "write what is given": attempt(lambda: (readable / "model").write_text("")),
                "add to what is given": attempt(lambda: (readable / "new").write_text("")),
            }
            Path("found.json").write_text(json.dumps(found))
        case "caller":
            caller = int(arguments[0])
            found = {
                "environment": attempt(lambda: Path(f"/proc/{caller}/environ").read_bytes()),
                "memory": attempt(lambda: Path(f"/proc/{caller}/mem").open("rb").close()),
            }
            if arguments[1:] == ("signal",):
                found["signal"] = attempt(lambda: os.kill(caller, signal.SIGUSR1))
            Path("found.json").write_text(json.dumps(found))
        case "fail":
            raise ValueError("the reason")
        case "chatter":
            for number in range(100_000):
                sys.stdout.write(f"{number} \x1b[2J\n")
        case "hang":
            subprocess.Popen([*SLEEP, arguments[0]], start_new_session=True)
            time.sleep(600)
        case "leave a process behind":
            subprocess.Popen([*SLEEP, arguments[0]], start_new_session=True)
        case "memory":
            bytearray(1024**3)
        case "memory of many":
            for _ in range(8):
                subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * 100 * 1024**2; time.sleep(600)"])
            time.sleep(600)
        case "processes":
            for _ in range(200):
                subprocess.Popen(["sleep", "600"])
            time.sleep(600)
        case "one large file":
            with Path("large").open("wb") as stream:
                for _ in range(4096):
                    stream.write(bytes(1024**2))
        case "many files":
            for number in range(100_000):
                Path(f"file{number}").write_bytes(bytes(1024**2))
        case "many folders":
            for number in range(int(arguments[0])):
                Path(f"folder{number}").mkdir()
            fail_or_wait(arguments[1])
        case "nested folders":
            for _ in range(int(arguments[0])):
                os.mkdir("inner")
                os.chdir("inner")
            Path("file").touch()
            fail_or_wait(arguments[1])
        case "closed folders":
            Path("closed/inner").mkdir(parents=True)
            for path in ("closed/inner", "closed"):
                Path(path).chmod(0)
            fail_or_wait(arguments[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
