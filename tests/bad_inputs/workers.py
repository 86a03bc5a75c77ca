"""Settings of worker processes and of Ray clusters that are wrong."""

from __future__ import annotations

from bad_inputs.case import Bad, spoken

_SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "an address of another form": (("--engine=ray", "--ray-address=http://x:1"), "required auto, HOST:PORT or ray://"),
    "an address without port": (("--engine=ray", "--ray-address=nonsense"), "required auto, HOST:PORT or ray://"),
    "a port that is none": (("--engine=ray", "--ray-address=localhost:99999"), "required auto, HOST:PORT or ray://"),
    "an address where nothing is": (
        ("--engine=ray", "--ray-address=127.0.0.1:9"),
        "ray_address 127.0.0.1:9: no Ray cluster answers at",
    ),
    "a client address where nothing is": (
        ("--engine=ray", "--ray-address=ray://127.0.0.1:9"),
        "no Ray cluster answers at",
    ),
    "a host that is unknown": (("--engine=ray", "--ray-address=nowhere.invalid:6379"), "no Ray cluster answers at"),
    "an address without Ray": (("--ray-address=auto",), "ray_address: only Ray has it; add --engine ray"),
    "GPUs of a trial without Ray": (("--workers=2", "--gpus-per-trial=1"), "gpus_per_trial: only Ray has it"),
    "CPUs of a trial without Ray": (("--workers=2", "--cpus-per-trial=2"), "cpus_per_trial: only Ray has it"),
    "one GPU and a half": (("--engine=ray", "--gpus-per-trial=1.5"), "required a whole number or a fraction below 1"),
    "GPUs of this machine and Ray": (("--devices=all", "--engine=ray"), "required without engine ray"),
    "GPUs of this machine and a number": (("--devices=all", "--workers=2"), "required without workers"),
    "devices that are none": (("--devices=some",), "devices must be one, all, or numbers such as 0,2"),
    "no worker": (("--workers=0",), "workers must be at least 1"),
    "a group one by one": (("--group-size=2", "--engine=serial"), "engine serial trains one trial after another"),
    "a race in groups": (("--group-size=2", "--race", "--lr=1e-3 1e-2"), "leave group_size out"),
    "patience without workers": (("--worker-minutes=5",), "this study has no worker processes"),
    "no patience with workers": (("--worker-minutes=0",), "worker_minutes must be above 0"),
}

CASES: tuple[Bad, ...] = spoken(
    {
        "one trial on a cluster": (("train", "--engine=ray"), "train runs one trial in this process"),
        **{name: (("study", *words), says) for name, (words, says) in _SETTINGS.items()},
    },
    "workers",
)
