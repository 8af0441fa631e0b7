"""The options of a sampler: what stays the same over its calls."""

import dataclasses
from typing import TypedDict, get_args

from elastic_lm.config.checks import require, require_at_least_1, require_type, require_types
from elastic_lm.config.decoding import WINDOW, Missing
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.depth.policies import ExitPolicy, require_policy
from elastic_lm.depth.preview_files import check_preview
from elastic_lm.nn.preview import HeadPreview
from elastic_lm.width.chooser import SubnetChooser


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How a `Sampler` decodes: early exits, their verification, and the sub-network that runs.

    How tokens are drawn (temperature, stop strings and so on) is not here but an argument of each call.

    Attributes:
      exit: metric and thresholds for the exits of the whole model; None = every token at full depth. A
        sub-network keeps the thresholds of the exits that it has.
      window: positions per row whose deeper layers may be pending; at least 1, and 2 for lossless decoding.
        Static: each size compiles its own programs.
      fire_share: share in [0, 1] of the rows that must wait before a deep tick fires; 0 = lowest latency,
        1 = highest throughput. Traced.
      stream_every: loop iterations between looks at the device while streaming or watching stop strings; at
        least 1. Traced.
      lossless: early tokens are drafts that the full model verifies (LayerSkip, arXiv 2404.16710). What is
        emitted is what full depth emits with the same seed, except for near-ties that bfloat16 rounds
        differently. In a batch, which tokens were drafts (`Sample.exit_layers`) depends on the other rows,
        for which the full model runs, too; the tokens do not. Each call may choose otherwise.
      lookup: lossless rows draft the tokens that followed the last ones earlier in their text, as many as
        acceptance and the time of a pass over them justify (prompt lookup, arXiv 2304.04487); alone, or
        before exits. Static.
      drafter: a sub-network that drafts for lossless rows of the whole model, in place of exits: it draws
        tokens one by one, with the weights and the keys and values that are there already, and the whole
        model verifies them together (`decode.drafting`). Layers that it leaves out cost no memory; what it
        cuts out of a layer is copied once per sampler, or in the program with `slice_inside`. With a
        `preview`, drafts are drawn from that, and the whole model reads its whole head. None = none. Static.
      preview: of the model's vocabulary head, from `el.depth.fit_preview`: most tokens are chosen by a part
        of the head's bytes, with the agreement that its report states. The report's bytes are those of a
        token at batch 1: a batch reads the whole head as soon as one row's preview is not sure. Exits that
        read the model's own head are previewed, too, and a token goes deeper where the preview is not sure.
        What lossless rows are verified by is the whole head. None = it is always read.
      draft: tokens that a lossless row drafts before it is verified, from 1 to window - 1; None = as many as
        acceptance justifies. An exit that is not confident ends a draft earlier. Traced.
      missing: what the deeper layers see of early tokens. "exact" = what they compute for them, later, in
        windows; "propagate" = keys and values of the state that the token left with (CALM, arXiv 2207.07061,
        sec. 3.3), an approximation that saves the deep work and cannot be verified. Static.
      together: rows leave early only if all rows that run are confident, as in CALM; for comparison. Traced.
      elastic: chooses sub-networks for budgets; None = calls name no budgets.
      budget: what the model that runs may cost; needs `elastic`. None = the whole model, or `subnet`, runs.
        Each call may choose otherwise.
      subnet: the sub-network that runs, instead of a budget. Its slice is an ordinary smaller model, to which
        depths, drafts and verification then refer. Each call may choose otherwise.
      keep_subnets: sub-networks whose slices and compiled programs stay in memory, at least 1; the one that
        was served longest ago goes first. The whole model always stays.
      slice_inside: sub-networks are sliced inside their programs whenever these run, and hold no memory
        between calls; while a batch is decoded, its slice lies in memory next to the whole model.

    Raises:
      ValueError: a field is out of range, or contradicts another one.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=2, exits=(1,))
      policy = el.ConfidenceExit("max_prob", thresholds=(0.03,), layers=(1,))
      options = el.DecodeOptions(exit=policy, lossless=True, window=2)

      sampler = el.Sampler(el.Decoder(config), random_params(config), options=options)
      sample = sampler.sample([1, 2, 3], max_new_tokens=8)
      print(sample.tokens, sample.stats.drafted, sample.stats.accepted)
      ```
    """

    exit: ExitPolicy | None = None
    window: int = WINDOW
    fire_share: float = 0.0
    stream_every: int = 16
    lossless: bool = False
    lookup: bool = False
    drafter: Drafter | Subnet | None = None
    preview: HeadPreview | None = dataclasses.field(default=None, compare=False)  # arrays do not compare
    draft: int | None = None
    missing: Missing = "exact"
    together: bool = False
    elastic: SubnetChooser | None = None
    budget: Budget | None = None
    subnet: Subnet | None = None
    keep_subnets: int = 4
    slice_inside: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        require_policy("exit", self.exit)
        for field in ("window", "stream_every", "keep_subnets"):
            require_at_least_1(field, getattr(self, field))
        require(0 <= self.fire_share <= 1, "fire_share", self.fire_share, "must be a share between 0 and 1")
        require(self.missing in get_args(Missing), "missing", self.missing, "must be exact or propagate")

        # At window=1, draft=1 is let through: calls that ask for lossless rows refuse the window itself.
        in_window = self.draft is None or 1 <= self.draft < max(self.window, 2)
        require(in_window, "draft", self.draft, f"must be at least 1 and below window={self.window}")

        exact = self.missing == "exact"
        require(exact or not self.lookup, "lookup", True, f"verifies nothing with missing={self.missing!r}")
        whole = self.budget is None and self.subnet is None and self.elastic is None
        fits = whole or self.preview is None
        require(fits, "preview", "given", "is of the whole model's features; leave sub-networks out")
        check_choice(self.budget, self.subnet, self.elastic)
        if self.drafter is not None:
            self._check_drafter()

    def _check_drafter(self) -> None:
        """What goes with a sub-network that drafts."""
        right = isinstance(self.drafter, Drafter | Subnet)
        require(right, "drafter", self.drafter, "must be an el.Drafter or an el.Subnet")
        fix = "a drafter takes the place of exits; leave one of them out"
        require(self.exit is None, "exit", self.exit, fix)
        fix = "drafts are copied, or drawn by a drafter; leave one of them out"
        require(not self.lookup, "lookup", self.lookup, fix)
        fix = "a drafter drafts for rows that are verified; use 'exact'"
        require(self.missing == "exact", "missing", self.missing, fix)
        require(self.window >= 2, "window", self.window, "a drafter needs at least 2")
        whole = self.budget is None and self.subnet is None and self.elastic is None
        fix = "drafts for the whole model; leave budget, subnet and elastic out"
        require(whole, "drafter", self.drafter, fix)

    def check(self, config: ModelConfig) -> None:
        """Checks that the options fit a model.

        Args:
          config: the whole model.

        Raises:
          ValueError: the policy, the chooser or the sub-network is one of another model.
        """
        if self.exit is not None:
            self.exit.check(config)
        if self.preview is not None:
            check_preview(self.preview, config)
        if self.elastic is not None:
            self.elastic.check(config)
        if self.subnet is not None:
            self.subnet.check(config)
        if self.drafter is not None:
            self._check_drafts(config)

    def _check_drafts(self, config: ModelConfig) -> None:
        """Checks that a drafter is a sub-network of the model, and can read its preview."""
        assert self.drafter is not None
        drafter = Drafter.of(self.drafter)
        drafter.check(config)
        width = drafter.subnet.d_model
        whole = self.preview is None or width == config.d_model
        fix = "the preview is of all channels; leave it out, or keep them"
        require(whole, "drafter.subnet.d_model", width, fix)


class DecodeKeywords(TypedDict, total=False):
    """The fields of `DecodeOptions` as keywords of `Sampler`, for type checkers and editors.

    A type checker takes no keywords from a dataclass. A test compares names and types of both.
    """

    exit: ExitPolicy | None
    window: int
    fire_share: float
    stream_every: int
    lossless: bool
    lookup: bool
    drafter: Drafter | Subnet | None
    preview: HeadPreview | None
    draft: int | None
    missing: Missing
    together: bool
    elastic: SubnetChooser | None
    budget: Budget | None
    subnet: Subnet | None
    keep_subnets: int
    slice_inside: bool


def make_options(options: DecodeOptions | None, fields: DecodeKeywords) -> DecodeOptions:
    """The options of a sampler that was given either them or some of their fields.

    Raises:
      TypeError: a name in `fields` is not a field of `DecodeOptions`.
      ValueError: both are given, or a field is out of range.
    """
    from_fields = DecodeOptions(**fields)
    require_type("options", options, DecodeOptions | None)
    if options is None:
        return from_fields
    for name, value in fields.items():
        fix = f"give either options or single fields; write it inside: options=DecodeOptions({name}=...)"
        raise ValueError(f"{name}={value!r}: {fix}")
    return options


def check_choice(budget: Budget | None, subnet: Subnet | None, elastic: SubnetChooser | None) -> None:
    """Checks what a sampler or a call says about the model that is to run.

    Raises:
      ValueError: both a budget and a sub-network are given, a budget without a chooser, or something else.
    """
    require_type("budget", budget, Budget | None)
    require_type("subnet", subnet, Subnet | None)
    if budget is not None and subnet is not None:
        raise ValueError(f"budget={budget}, subnet={subnet}: each says what runs; give one of them")
    if budget is not None and elastic is None:
        fix = "sub-networks for budgets are chosen by Sampler(..., elastic=el.SubnetChooser.load(folder))"
        raise ValueError(f"budget={budget}: {fix}")
