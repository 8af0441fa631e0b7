"""What a quickstart run is asked to do."""

import dataclasses

from elastic_lm.config.checks import SEED, require_choice, require_each, require_types
from elastic_lm.config.decoding import WINDOW
from elastic_lm.config.exit_policy import DEFAULT_METRIC, GATE_METRIC, METRICS
from elastic_lm.config.model import DTYPES, ExitConfig, ExitKind
from elastic_lm.files.local import local_path

HELD_OUT_TOKENS = 20_000  # that thresholds are fitted on, and as many others that they are tested on


@dataclasses.dataclass(frozen=True)
class Options:
    """Every choice of a quickstart run."""

    out: str = "runs/quickstart"  # folder for everything that is written
    hf_dir: str | None = None  # a folder, or a name on the Hub, instead of the embedded model
    data: tuple[str, ...] = ()  # text files or folders; () = the interpreter's own library
    from_scratch: bool = False  # pretrain a small model instead of loading one
    pretrain_steps: int = 300  # with from_scratch
    exits: tuple[int, ...] = ()  # layers with an exit; () = one, after three quarters of them
    kind: ExitKind | None = None  # of the exits; None = norm, or on a model of one's own a fitted linear map
    tied: bool = False  # exits share the model's own vocabulary head
    minutes: float = 10.0  # that a run on a model of one's own is sized for; sizes below are its most
    steps: int = 60  # EE-tuning steps
    lr: float = 1e-3  # EE-tuning learning rate
    batch_size: int = 8  # rows per training step
    seq_len: int = 256  # tokens per row
    metric: str = DEFAULT_METRIC  # confidence that thresholds are compared with
    targets: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99, 0.995)  # agreement with the full model
    calibration_tokens: int = HELD_OUT_TOKENS  # held-out tokens that thresholds are fitted on
    test_tokens: int = HELD_OUT_TOKENS  # other held-out tokens that agreement is reported on
    prompts: int = 8  # held-out prompts that are continued
    prompt_tokens: int = 48  # tokens of each prompt
    new_tokens: int = 256  # tokens generated per prompt
    rounds: int = 7  # timed rounds; full depth and all targets take turns in each
    dtype: str | None = None  # of the parameters and activations that are measured; None = as saved
    window: int = WINDOW  # positions whose deeper layers may be pending
    seed: int = 0  # of random exits and of the shuffle
    tiny: bool = False  # the numbers of `tiny()` are in use

    def __post_init__(self) -> None:
        require_types(self)
        for path in (self.out, *([] if self.hf_dir is None else [self.hf_dir]), *self.data):
            local_path(path)
        for field in ("steps", "pretrain_steps"):
            if getattr(self, field) < 2:
                raise ValueError(f"{field}={getattr(self, field)}: at least 2 steps are needed")
        require_each(self, "", ("seed",), *SEED)
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}: must be above 0")
        if not self.targets:
            raise ValueError("targets=(): name at least one agreement, like 0.99")
        require_choice("metric", self.metric, METRICS)
        if self.dtype is not None:
            require_choice("dtype", self.dtype, DTYPES)
        if self.metric == GATE_METRIC:
            raise ValueError(
                f"metric={self.metric!r}: reads gates, which quickstart's exits lack; choose another"
            )
        if len(set(self.exits)) < len(self.exits):
            raise ValueError(f"exits={self.exits}: name every layer once")
        for layer in self.exits or (1,):
            ExitConfig(layer, self.kind or "norm")
        if self.from_scratch and self.hf_dir:
            raise ValueError(
                f"--from-scratch trains a model and --hf-dir {self.hf_dir} reads one: give one of them"
            )

    def fitted(self, max_len: int) -> "Options":
        """The same job with rows and texts that a model with this context takes.

        Raises:
          ValueError: the context is too short for prompts with continuations.
        """
        if max_len < 16:
            raise ValueError(
                f"the model's max_len={max_len} is too short for a quickstart, which needs 16 tokens"
            )
        prompt_tokens = min(self.prompt_tokens, max_len // 3)
        return dataclasses.replace(
            self,
            seq_len=min(self.seq_len, max_len),
            prompt_tokens=prompt_tokens,
            new_tokens=min(self.new_tokens, max_len - prompt_tokens),
        )

    def shrunk(self) -> "Options":
        """The same job in moments, to see that everything works."""
        return dataclasses.replace(
            self,
            pretrain_steps=min(self.pretrain_steps, 8),
            steps=min(self.steps, 6),
            batch_size=2,
            seq_len=64,
            targets=self.targets if len(self.targets) < 3 else (0.9, 0.99),
            calibration_tokens=1024,
            test_tokens=1024,
            prompts=2,
            prompt_tokens=16,
            new_tokens=16,
            rounds=5,
            tiny=True,
        )
