"""Stand-ins for Slurm's commands, by the name they are called by; all nodes of a job are this machine.

They do what Slurm 22.05 was seen to do: the batch shell runs a copy of the script, an `srun` that is ended kills its
tasks, and a job is started again after `scontrol requeue`. The folder STANDIN_JOB holds the job: its log, its state
as `squeue` shows it, and the process number of each batch shell.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def main() -> None:
    """Run the command that this file is called by."""
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    job = Path(os.environ["STANDIN_JOB"])
    if program == "sbatch":
        sys.exit(sbatch(job, words))
    if program == "srun":
        sys.exit(srun(words))
    if program == "squeue":
        print((job / "state").read_text(encoding="utf-8"))
    elif program == "scontrol" and words[0] == "requeue":
        (job / "requeued").write_text(words[1], encoding="utf-8")


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options ahead of the first other word, written `--name=value` or `--name`, and the other words."""
    count = next((at for at, word in enumerate(words) if not word.startswith("--")), len(words))
    found = [word.removeprefix("--").partition("=") for word in words[:count]]
    return {name: value for name, _, value in found}, words[count:]


def sbatch(job: Path, words: list[str]) -> int:
    """Run a script to its end, again after each requeue; return its exit code."""
    given, (script, *arguments) = options(words)
    text = Path(script).read_text(encoding="utf-8")
    given = {**options(re.findall(r"(?m)^#SBATCH (--\S+)$", text))[0], **given}
    copy = job / "slurm_script"
    copy.write_text(text, encoding="utf-8")
    variables = {
        "SLURM_JOB_ID": os.environ["STANDIN_ID"],
        "SLURM_JOB_NAME": given["job-name"],
        "SLURM_JOB_NUM_NODES": given["nodes"],
        "SLURM_CPUS_PER_TASK": given["cpus-per-task"],
    }
    if "array" in given:
        variables |= {"SLURM_ARRAY_JOB_ID": os.environ["STANDIN_ID"], "SLURM_ARRAY_TASK_ID": given["array"]}
    for restart in range(9):
        (job / "requeued").unlink(missing_ok=True)
        environment = {**os.environ, **variables, "SLURM_RESTART_COUNT": str(restart)}
        with (job / "log").open("ab") as log:
            shell = subprocess.Popen(
                ["bash", str(copy), *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        (job / f"batch{restart}").write_text(str(shell.pid), encoding="utf-8")
        code = shell.wait()
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        if not (job / "requeued").exists():
            break
    return code


def srun(words: list[str]) -> int:
    """Run a command once for each task; killed with all its processes when this one is told to end."""
    given, command = options(words)
    output = open(given["output"], "ab") if "output" in given else None  # noqa: SIM115
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(number)}, stdout=output, stderr=output)
        for number in range(int(given["ntasks"]))
    ]

    def end(number: int, frame: object) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    signal.signal(signal.SIGTERM, end)
    return max(abs(task.wait()) for task in tasks)


if __name__ == "__main__":
    main()
