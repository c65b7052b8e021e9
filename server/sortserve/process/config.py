"""Every setting of ``sortserve serve``, in one frozen model.

Flag > environment (``SORTSERVE_*``) > ``--config`` file > default. The model below *is* the command
line, the environment, the file and ``docs/configuration.md``: a field's name, type, default and
docstring are written once (``flags.py`` turns them into flags and pages).
``python -m sortserve.process.flags`` prints the page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
)

from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.budget import DEFAULT_MIN_QUALITY, Budget
from sortserve.core.weights import TIER_WEIGHTS, KeyWeights, WeightRules
from sortserve.process.api_keys import read_named_keys
from sortserve.process.config_errors import config_error
from sortserve.process.device_settings import ReplicaSettings
from sortserve.process.keys import read_keys
from sortserve.process.sources import (
    key_name,
    read_environment,
    read_file,
    read_small_file,
)
from sortserve.process.values import (
    MAX_COUNT,
    Auto,
    BudgetText,
    Count,
    FilePath,
    Host,
    Layers,
    Number,
    PositiveSeconds,
    Seconds,
    Secrets,
    Share,
    Size,
    Strings,
    Text,
    TierWeights,
    budget_of,
    is_network,
    tier_weights_of,
)
from sortserve.scheduling.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from sortserve.scheduling.policies.table import DEFAULT_POLICY, POLICIES

__all__ = ["ServeSettings", "load_settings", "settings_yaml"]

ABOUT_POLICIES = f"What steps run: {', '.join(f'{p.name} {p.about}' for p in POLICIES.values())}."
ABOUT_OBJECTIVES = (
    "What the choice of exits, and of whom to refuse, makes most of: "
    f"{', '.join(f'{o.name} {o.about}' for o in OBJECTIVES.values())}."
)
if TYPE_CHECKING:
    PolicyName = str
    ObjectiveName = str
else:  # one of those in the tables
    PolicyName = Literal[tuple(POLICIES)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]


class ServeSettings(ReplicaSettings):
    """What a server is started with. Reads the environment and the file unless given by keyword."""

    # Model
    model: Text = "sorted-smollm2-135m"
    """What to serve: a folder, a Hugging Face id, `package:NAME/FILE`, a file inside an installed
    Python package, or the name of a checkpoint that comes with sortserve."""
    served_model_name: Text | None = None
    """Name in the API and the metrics. Default: the checkpoint's own."""
    exits: Layers | None = None
    """Exit layers to open, separated by commas. Default: those of the checkpoint's sorted.json."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and KV cache. auto: the checkpoint's where the device is fast at it."""
    quantize: Text = "none"
    """Make the weights smaller at load: int8 (8 bits, for our own kernels), or nf4 (4 bits) and
    int8-bnb (8 bits), both by bitsandbytes. none: as they are."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id."""
    max_model_len: Annotated[Annotated[int, Field(ge=2, le=MAX_COUNT), Number] | None, Auto] = None
    """Most tokens of prompt and answer together, 2 or more. auto, the default: what the checkpoint
    allows."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Number] | None = None
    """Makes requests without a seed of their own repeatable, in their order of arrival."""

    # Network
    host: Host = "127.0.0.1"
    """Address to listen on. 0.0.0.0 is every interface."""
    port: Annotated[int, Field(ge=0, le=65535), Number] = 8000
    """Port to listen on. 0 takes a free one."""
    uds: Annotated[Text, Field(min_length=1)] | None = None
    """Path of a Unix socket to listen on, instead of host and port."""
    root_path: Text = ""
    """Path prefix that a reverse proxy strips."""
    ssl_certfile: FilePath | None = None
    """TLS certificate (PEM). Needs --ssl-keyfile."""
    ssl_keyfile: FilePath | None = None
    """TLS private key (PEM). Needs --ssl-certfile."""
    cors_allow_origins: Strings = ()
    """Origins that browsers may call from, separated by commas. Default: none."""
    enable_docs: bool = True
    """Serve /docs and /openapi.json."""
    vllm_metric_names: bool = False
    """Tell vLLM's metrics under vLLM's names as well, for boards that were made for it."""
    allow_special_in_content: bool = False
    """Take special tokens that a message writes out, such as <|im_start|>, for control tokens."""
    playground: bool = True
    """Serve a page at / on which people can try the model and its budgets."""
    forwarded_allow_ips: Strings = ()
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed,
    separated by commas; `*` is everybody. Default: none, the log shows who is connected."""
    allowed_hosts: Strings = ()
    """Names that requests may give as their Host, beside localhost and --host, separated by commas;
    `*` is any. Default: any, but on a loopback address without keys no other name is answered, so
    that no web page can reach the server under a name of its own."""

    # Security
    api_key: Secrets = ()
    """Keys that clients must send as `Authorization: Bearer KEY`, separated by commas. Prefer the
    variable or --api-key-file: other users of the machine can read flags."""
    api_key_file: FilePath | None = None
    """File with one key a line; empty lines and lines that start with # are skipped. After a key
    there may be `default=WEIGHT`, of its requests that name no service tier, and `max=WEIGHT`, the
    most that any of them gets."""
    api_keys_file: FilePath | None = None
    """YAML file of named keys, by their hashes, with limits of their own: requests and tokens a
    minute, concurrency, deepest exit, priority. `sortserve keys new` makes an entry. It is read
    anew when it changes, and on SIGHUP."""

    # Scheduling
    policy: PolicyName = Field(default=DEFAULT_POLICY, description=ABOUT_POLICIES)
    objective: ObjectiveName = Field(default=DEFAULT_OBJECTIVE, description=ABOUT_OBJECTIVES)
    min_quality: Share = DEFAULT_MIN_QUALITY
    """Exits of a lower score (unmeasured: share of layers) are for requests that name the exit,
    min_exit_layer or min_quality. 0: no floor."""
    structured_min_quality: Share | None = None
    """Floor of requests with a schema or a grammar that name none. Default: --min-quality."""
    default_budget: BudgetText | None = None
    """Budget of requests that give none, as JSON: `{"min_quality": 0.8}`. Default: no bound."""
    overload_degrade: bool = False
    """Let overload make requests without a budget shallower, too, down to --min-quality."""
    overload_delay: Seconds = 2.0
    """Predicted seconds in the queue beyond which requests that bound no time and may be made
    shallower start so, one exit at a time. 0: never."""
    tier_weights: TierWeights = tuple(f"{name}={w:g}" for name, w in TIER_WEIGHTS.items())
    """What a request of each service_tier is worth beside others, 0.001 to 1000."""
    priority_base: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False), Number] = 1.1
    """A request's weight is multiplied by this to the power of minus its priority."""
    max_num_seqs: Count = 256
    """Most sequences that run at once."""
    max_num_batched_tokens: Count = 1024
    """Most tokens of one step; longer prompts are prefilled in chunks."""
    async_scheduling: Annotated[bool | None, Auto] = None
    """Plan a step while the one before it runs. auto, the default: on a GPU."""
    calibrate: bool = True
    """Measure step times at start-up, so that latency budgets can be judged."""

    # KV cache
    kv_cache_memory: Annotated[Size | None, Auto] = None
    """Memory of the KV cache, such as 2GiB. auto, the default: a quarter of the free memory, and
    never more than --max-num-seqs sequences of full length need."""
    block_size: Count = 16
    """Tokens of one KV block."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""

    # Limits
    max_num_queued_reqs: Count = 512
    """Most requests waiting; more are answered 429."""
    max_num_queued_tokens: Count = 200_000
    """Most prompt tokens waiting; more are answered 429."""
    max_body_size: Size = ByteSize(4 << 20)
    """Largest request body; larger ones are answered 413."""
    max_header_size: Size = ByteSize(64 << 10)
    """Most bytes of a request's first line and headers; more are answered 431."""
    max_num_headers: Count = 200
    """Most header fields of a request; more are answered 431."""
    max_connections: Count = 1000
    """Most open connections. Beyond them only probes are answered, all else gets 503."""
    keep_alive: PositiveSeconds = 75.0
    """Seconds that a connection without a request stays open."""
    header_timeout: PositiveSeconds = 10.0
    """Seconds from a request's first byte to the end of its headers; slower ones get 408."""
    body_timeout: PositiveSeconds = 60.0
    """Seconds from the end of a request's headers to the end of its body; slower ones get 408."""
    write_timeout: PositiveSeconds = 60.0
    """Seconds that a client may leave its answer unread before its connection is cut."""
    client_timeout: PositiveSeconds | None = None
    """Most seconds that any of --header-timeout, --body-timeout and --write-timeout allows."""
    request_timeout: Seconds | None = None
    """Seconds after which any request is cut off and answered 504. Default: never."""
    shutdown_timeout: Seconds = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    # Failures
    max_failed_steps: Count = 3
    """Steps in a row that may fail and give no token, each followed by a self-test that fails too,
    before the process ends."""
    step_timeout: Seconds = 300.0
    """Seconds after which an engine that does not get on has failed, and the process ends; likewise
    an event loop. The longest step must fit in. 0: never."""
    debug: bool = False
    """Check the engine's books whenever it is idle; a mistake in them ends the process."""

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to write."""
    log_format: Literal["human", "json"] = "human"
    """Lines for people, or one JSON object a line."""
    log_prompts: bool = False
    """Write prompts and answers into the log. They may be private."""
    access_log: bool = False
    """One line per HTTP request, probes excepted."""
    otlp_traces_endpoint: Annotated[Text, Field(min_length=1)] | None = None
    """Address of an OpenTelemetry collector that gets the spans of requests. Needs the extra
    `otel`. Default: nothing is traced."""

    # File
    config: FilePath | None = None
    """YAML file with any of these settings; keys are flag names without the dashes in front."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then our reading of the environment, then the file: first come, first kept."""
        names = cls.model_fields
        environment = read_environment(os.environ, names)
        path = {**environment, **init_settings()}.get("config")
        return (
            init_settings,
            InitSettingsSource(settings_cls, environment),
            InitSettingsSource(settings_cls, read_file(Path(path), names) if path else {}),
        )

    @model_validator(mode="after")
    def _check_together(self) -> ServeSettings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile go together: give both or neither")
        for name in ("ssl_certfile", "ssl_keyfile"):
            if (path := getattr(self, name)) is not None:
                read_small_file(path, name, errors="replace")  # comments in it may be anything
        if self.api_key_file is not None and not self.api_keys:
            raise ValueError(f"--api-key-file {self.api_key_file} has no key in it")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 0):
            raise ValueError(f"--max-replicas {self.max_replicas} is less than --replicas")
        self.key_policies()
        for proxy in self.forwarded_allow_ips:
            if proxy != "*" and not is_network(proxy):
                raise ValueError(
                    f"--forwarded-allow-ips {proxy!r} is not an address, a network or *"
                )
        return self

    @cached_property
    def api_keys(self) -> tuple[str, ...]:
        """All accepted keys, in clear: from flags or environment, and from the key file."""
        given = (key.get_secret_value() for key in self.api_key)
        return tuple(dict.fromkeys([*given, *self.key_weights]))

    @cached_property
    def key_weights(self) -> dict[str, KeyWeights]:
        """The keys of the key file, which is read once, and what their requests are worth."""
        return {} if self.api_key_file is None else read_keys(self.api_key_file)

    @property
    def is_guarded(self) -> bool:
        """Whether a key is needed."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def key_policies(self) -> tuple[KeyPolicy, ...]:
        """What each key may do; the file of named keys is read each time.

        Raises:
            ConfigError: that file is wrong.
        """
        plain = [KeyPolicy(digests=(key_digest(k),), weights=w) for k, w in self._plain_keys()]
        if self.api_keys_file is None:
            return tuple(plain)
        others = [digest for policy in plain for digest in policy.digests]
        named = read_named_keys(self.api_keys_file, base=self.priority_base, others=others)
        return (*plain, *named)

    def _plain_keys(self) -> list[tuple[str, KeyWeights]]:
        """Keys without a name, and what their requests are worth."""
        return [(key, self.key_weights.get(key, KeyWeights())) for key in self.api_keys]

    @property
    def weight_rules(self) -> WeightRules:
        """What tiers and priorities are worth."""
        return WeightRules(tier_weights_of(self.tier_weights), self.priority_base)

    @property
    def budget_by_default(self) -> Budget:
        """``default_budget`` as a budget."""
        return budget_of(self.default_budget or "{}")

    def masked(self) -> dict[str, Any]:
        """The settings as plain values for logs and ``--print-config``; secrets are stars."""
        values = self.model_dump(mode="json")
        for name, value in self:
            if isinstance(value, ByteSize):
                values[name] = value.human_readable().replace(".0", "")
        return values


def load_settings(flags: Mapping[str, Any] | None = None) -> ServeSettings:
    """The settings from flags (by field name), environment, file and defaults.

    Raises:
        ConfigError: one line that names the flag, variable or key, its value and what is allowed.
    """
    flags = dict(flags or {})
    try:
        return ServeSettings(**flags)
    except ValidationError as error:
        raise config_error(error, flags, ServeSettings.model_fields) from None


def settings_yaml(settings: ServeSettings) -> str:
    """The resolved settings as a config file; what is unset is left out, and secrets are."""
    values = {
        key_name(name): value
        for name, value in settings.masked().items()
        if value is not None and name not in ("api_key", "config")
    }
    keys = f"# api-key: {len(settings.api_key)} not shown\n" if settings.api_key else ""
    return str(yaml.safe_dump(values, sort_keys=False)) + keys
