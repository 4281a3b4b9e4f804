"""Command lines into configs, and the help that lists their flags. Imports no JAX."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

from jrlhf.config import Config, ConfigError, PlanConfig, Sources, check, load_config
from jrlhf.config.files import apply_flags, flag_types
from jrlhf.system.suggest import did_you_mean

T = TypeVar("T")

STAGES = {
    "pipeline": ("run", "seed", "accept_changes", "mesh", "distributed", "sft", "reward", "ppo"),
    "sft": ("run", "seed", "accept_changes", "mesh", "distributed", "sft"),
    "reward": ("run", "seed", "accept_changes", "mesh", "distributed", "reward"),
    "ppo": ("run", "seed", "accept_changes", "mesh", "distributed", "ppo"),
}
"""Commands that train by a YAML, and the parts of it that each sets by flags."""
PLANNED = ("topology", "completions", "out")
"""What only planning asks for, besides all that a pipeline does."""


def stage_config(command: str, argv: Sequence[str]) -> Config:
    """The defaults, under the YAML, under the flags."""
    return _under_flags(read_flags(command, argv, stage_flags(Config, STAGES[command])))


def plan_config(argv: Sequence[str]) -> PlanConfig:
    """A pipeline's config, and what stands on the command line alone."""
    flags = read_flags("plan", argv, stage_flags(PlanConfig, (*PLANNED, *STAGES["pipeline"])))
    asked = {name: flags.pop(name) for name in PLANNED if name in flags}
    config = apply_flags(PlanConfig(**vars(_under_flags(flags))), asked)
    check(config)
    return config


def _under_flags(flags: dict[str, list[str]]) -> Config:
    if "config" in flags:
        [path] = flags.pop("config")
        return load_config(path, flags)
    config = apply_flags(Config(), flags)
    check(config)
    return config


def stage_flags(cls: type, parts: Sequence[str]) -> dict[str, Any]:
    """Flag -> type; the parts of other stages are the YAML's alone."""
    kept = {path: hint for path, hint in flag_types(cls).items() if path.split(".")[0] in parts}
    return {"config": str, **kept}


def tool_config(command: str, cls: type[T], argv: Sequence[str]) -> T:
    """The arguments of a command that reads no YAML; what has no default comes first, without a flag."""
    required = required_fields(cls)
    named = [*required, *(f.name for f in fields(cast(Any, cls)) if f.metadata.get("positional"))]
    flags = read_flags(command, argv, flag_types(cls), positional=named)
    if missing := [name for name in required if name not in flags]:
        order = " ".join(name.upper() for name in required)
        raise ConfigError(f"{missing[0]}: is missing; usage: jrlhf {command} {order} [--FLAG VALUE ...]")
    config = apply_flags(cls(**dict.fromkeys(required, "")), flags)
    check(config)
    return config


def required_fields(cls: Any) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def read_flags(
    command: str, argv: Sequence[str], types: Mapping[str, Any], *, positional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Texts by path, of `--a.b VALUE`, `--a.b=VALUE`, `--list X Y` and `--switch [true|false]`; a later one wins."""
    flags: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "-" or not argument.startswith("-"):
            name = next((name for name in positional if name not in flags), None)
            if name is None:
                raise ConfigError(f"{argument}: unexpected; a value follows its flag, as in --seed 1")
            flags[name] = [argument]
            continue
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in types or not flag.startswith("--"):
            meant = did_you_mean(flag.lstrip("-"), types, "--") if len(flag) > 2 else ""
            # Beside a top-level flag stand whole sections too, so a list of the flags there would say too little.
            known = meant if "." in name or "did you mean" in meant else f"; jrlhf {command} --help lists them"
            raise ConfigError(f"{flag}: unknown flag{known}")
        if equals:
            flags[name] = [value]
        elif get_origin(types[name]) is tuple:
            flags[name] = []
            while rest and not rest[0].startswith("--"):
                flags[name].append(rest.pop(0))
        elif types[name] is bool:
            flags[name] = [rest.pop(0)] if rest and rest[0].lower() in ("true", "false") else ["true"]
        elif rest and not rest[0].startswith("--"):
            flags[name] = [rest.pop(0)]
        else:
            raise ConfigError(f"{flag}: expected a value")
    return flags


def print_help(command: str, cls: type, about: str) -> None:
    """Every flag with its type, meaning and default, from the dataclasses and their docstrings; no other stage's."""
    import tyro

    if issubclass(cls, Config):
        parts = STAGES.get(command, STAGES["pipeline"])
        config_help = tyro.conf.arg(help="A recipe; it may hold the other stages too.", metavar="FILE.yaml")
        changed: list[Any] = [("config", Annotated[str, config_help], field(default=""))]
        for f in fields(Config):
            if f.name not in parts:
                suppressed = Annotated[f.type, tyro.conf.Suppress]  # pyright: ignore[reportInvalidTypeForm]
                changed += [(f.name, suppressed, field(default_factory=f.default_factory))]
        cls = make_dataclass("Shown", changed, bases=(cls,), frozen=True)
        about += " Flags win over the YAML, and the YAML over the defaults shown here."
    elif required := required_fields(cls):
        named = " ".join(f"--{name} {name.upper()}" for name in required)
        about += f" The positional arguments may be named instead: {named}."
    markers = (
        tyro.conf.FlagConversionOff,
        tyro.conf.PositionalRequiredArgs,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_sources_help)
    try:
        with registry:
            tyro.cli(
                cls, prog=f"jrlhf {command}", description=about, args=["--help"], use_underscores=True, config=markers
            )
    except SystemExit as done:
        if done.code:
            raise


def _sources_help(info: Any) -> Any:
    """How sources are written on a command line: as in the YAML."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type != get_args(Sources)[0]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR|{STR: FLOAT, ...}",
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: isinstance(value, str | dict),
        str_from_instance=lambda value: [str(value)],
    )
