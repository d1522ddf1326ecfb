"""The registry of metrics: every measured column, its label and unit, and how its numbers are written and drawn.

Tables, figures, the report, exports and the documentation read what they need from here. What a column means in detail is
the description in its JSON Schema (schemas/*.json), which `Metric.description` returns.
"""

from dataclasses import dataclass

from evals.results.schema import schema


@dataclass(frozen=True)
class Unit:
    """A unit and its steps. A value is written in the largest step that is not above it."""

    steps: tuple[tuple[float, str], ...]  # (factor, suffix) in ascending order, e.g. (1e-3, " ms")

    def format(self, value: float, digits: int = 4) -> str:
        """Writes a value, e.g. 0.0123 s as '12.3 ms', with at most `digits` significant digits."""
        # A tick computed as 10 ** x can miss its decade by a rounding.
        factor, suffix = next((step for step in reversed(self.steps) if value >= step[0] * (1 - 1e-9)), self.steps[0])
        return f"{float(f'{value / factor:.{digits}g}'):.4g}{suffix}"


NUMBER = Unit(((1, ""),))
COUNT = Unit(((1, ""), (1e3, " k"), (1e6, " M"), (1e9, " G")))
SECONDS = Unit(((1e-9, " ns"), (1e-6, " µs"), (1e-3, " ms"), (1, " s")))
BYTES = Unit(((1, " B"), (2**10, " KiB"), (2**20, " MiB"), (2**30, " GiB"), (2**40, " TiB")))
RATIO = Unit(((1, "×"),))
PERCENT = Unit(((0.01, " %"),))


@dataclass(frozen=True)
class Metric:
    """One measured column of a results table."""

    name: str  # identifier, used in file names of figures and in the report
    column: str  # in SI units
    label: str  # for titles; "{reference}" stands for the name of the reference attention
    unit: Unit = NUMBER  # how a single value is written, on axes and in prose
    low: str | None = None  # columns of the ends of its interval; None if it has no interval
    high: str | None = None
    higher_is_better: bool | None = False  # None if neither direction is better
    heading: str = ""  # of its column in a table of several metrics
    display_unit: str = ""  # unit of all values in a table
    display_scale: float = 1.0  # a value is divided by this to get to its display unit
    # In a table. None: as many as show three digits, and the interval in percent; otherwise the interval in the metric's unit.
    decimals: int | None = None
    log_scale: bool = True  # whether its axis is logarithmic
    log_base: int = 10  # ratio of two neighbouring ticks of a logarithmic axis

    @property
    def better(self) -> str:
        """The direction in words: 'lower is better', 'higher is better', or empty."""
        return {None: "", True: "higher is better", False: "lower is better"}[self.higher_is_better]

    @property
    def description(self) -> str:
        """The meaning of the column, from the first schema that has it."""
        return next(
            str(columns[self.column]["description"])
            for columns in (schema(table)["properties"] for table in ("latency", "accuracy", "max_context", "conversion"))
            if self.column in columns
        )

    def title(self, reference: str = "the reference") -> str:
        """Title of a figure: 'Latency, lower is better'."""
        label = self.label.format(reference=reference)
        return ", ".join(filter(None, (label[0].upper() + label[1:], self.better)))

    def table_title(self, reference: str = "the reference") -> str:
        """Title of a table, which names the unit of all its values: 'latency in ms, lower is better'."""
        unit = f" in {self.display_unit}" if self.display_unit else ""
        return ", ".join(filter(None, (self.label.format(reference=reference) + unit, self.better)))


LATENCY = Metric(
    *("latency", "latency_s", "latency", SECONDS, "latency_low_s", "latency_high_s"),
    heading="ms",
    display_unit="ms",
    display_scale=1e-3,
)
THROUGHPUT = Metric(
    *("throughput", "tokens_per_s", "throughput in tokens/s", COUNT, "tokens_per_s_low", "tokens_per_s_high"),
    higher_is_better=True,
    heading="tokens/s",
)
SPEEDUP = Metric(
    *("speedup", "speedup", "speed-up over {reference}", RATIO, "speedup_low", "speedup_high"),
    higher_is_better=True,
    heading="speed-up",
    log_base=2,
)
PEAK_MEMORY = Metric(
    *("peak_memory", "peak_bytes", "peak memory above inputs and parameters", BYTES),
    heading="peak MiB",
    display_unit="MiB",
    display_scale=2.0**20,
    log_base=2,
)
ROOFLINE = Metric(
    *("roofline", "roofline_fraction", "fraction of the roofline", PERCENT),
    higher_is_better=True,
    heading="% of roofline",
    display_unit="%",
    display_scale=0.01,
)
STATE = Metric(
    *("state", "state_bytes", "decoding state", BYTES),
    heading="state KiB",
    display_unit="KiB",
    display_scale=2.0**10,
    log_base=2,
)
SENT = Metric(
    *("sent", "sent_bytes", "data sent per call by one rank", BYTES),
    heading="sent MiB",
    display_unit="MiB",
    display_scale=2.0**20,
    log_base=2,
)
FLOPS = Metric(
    *("flops", "flops", "computation per call", COUNT),
    higher_is_better=None,
    heading="MFLOP",
    display_unit="MFLOP",
    display_scale=1e6,
)
NOISE_FLOOR = Metric(
    *("noise_floor", "noise_floor", "noise floor", PERCENT),
    heading="noise %",
    display_unit="%",
    display_scale=0.01,
)
MAX_CONTEXT = Metric(
    *("max_context", "max_context", "longest context that fits, in tokens", NUMBER),
    higher_is_better=True,
    heading="tokens",
    log_base=2,
)
ACCURACY = Metric(
    *("accuracy", "accuracy", "accuracy", NUMBER, "accuracy_low", "accuracy_high"),
    higher_is_better=True,
    heading="accuracy",
    decimals=3,
    log_scale=False,
)
BITS_PER_BYTE = Metric(
    *("bits_per_byte", "bits_per_byte", "bits per byte", NUMBER, "bits_per_byte_low", "bits_per_byte_high"),
    heading="bits/byte",
    decimals=3,
    log_scale=False,
)
LOSS = Metric(
    *("loss", "loss_nats", "loss in nats per target", NUMBER, "loss_low_nats", "loss_high_nats"),
    heading="nats/target",
    decimals=3,
)
TRAINING_TIME = Metric("train_time", "train_s", "training time", SECONDS, heading="training s", display_unit="s")
PERPLEXITY = Metric("perplexity", "perplexity", "perplexity", NUMBER, heading="perplexity", decimals=2, log_scale=False)

METRICS = {
    metric.column: metric
    for metric in (
        *(LATENCY, THROUGHPUT, SPEEDUP, PEAK_MEMORY, ROOFLINE, STATE, SENT, FLOPS, NOISE_FLOOR, MAX_CONTEXT),
        *(ACCURACY, BITS_PER_BYTE, LOSS, TRAINING_TIME, PERPLEXITY),
    )
}
"""All metrics, by their column."""
