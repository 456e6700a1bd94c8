"""Runs a command that prints too much or too little: `python -m hack.progress NAME COMMAND…`.

Shows NAME, the time and the command's last line meanwhile. Its whole output is shown if it fails.
"""

import subprocess
import sys

from wherry_cli.progress import step


def main() -> int:
    name, *command = sys.argv[1:]
    lines: list[str] = []
    try:
        with (
            step(name) as report,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        ):
            for line in process.stdout or ():
                lines.append(line)
                report(line.strip().replace("[", "\\[")[:80])
            report("")
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, command)  # noqa: TRY301 - ends the step as failed
    except subprocess.CalledProcessError as error:
        sys.stderr.writelines([*lines, f"exit status {error.returncode}: {' '.join(command)}\n"])
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
