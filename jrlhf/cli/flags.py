"""Turns command lines into configs, and prints the help of their flags. Imports no JAX."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

from jrlhf.config import Config, ConfigError, PlanConfig, Sources, Switch, check, load_config, stage_sections
from jrlhf.config.files import apply_flags, flag_types
from jrlhf.system.suggest import did_you_mean

T = TypeVar("T")

PLAN_ONLY = ("topology", "compile", "completions", "out")
"""Fields of a plan that are not in the config of a pipeline."""


def sections(command: str) -> tuple[str, ...]:
    """Return the sections of the YAML that the flags of a command set: those of one stage, or of all."""
    stages = [*stage_sections()]
    return *(f.name for f in fields(Config) if f.name not in (*stages, "safety")), *(
        [command] if command in stages else stages
    )


def stage_config(command: str, argv: Sequence[str]) -> Config:
    """Read the config of a stage: flags override the YAML, and the YAML overrides the defaults."""
    return _under_flags(read_flags(command, argv, stage_flags(Config, sections(command))))


def plan_config(argv: Sequence[str]) -> PlanConfig:
    """Read the config of a plan: that of a pipeline, and the fields that only flags set."""
    flags = read_flags("plan", argv, stage_flags(PlanConfig, (*PLAN_ONLY, *sections("pipeline"))))
    own = {name: flags.pop(name) for name in PLAN_ONLY if name in flags}
    config = apply_flags(PlanConfig(**vars(_under_flags(flags))), own)
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
    """Map each flag to its type. Only the YAML sets the sections of other stages."""
    flags = {path: hint for path, hint in flag_types(cls).items() if path.split(".")[0] in parts}
    return {"config": str, **flags}


def tool_config(command: str, cls: type[T], argv: Sequence[str]) -> T:
    """Read the arguments of a command without YAML. A field without a default is a positional argument."""
    required = required_fields(cls)
    named = [*required, *(f.name for f in fields(cast(Any, cls)) if f.metadata.get("positional"))]
    flags = read_flags(command, argv, flag_types(cls), positional=named)
    if missing := [name for name in required if name not in flags]:
        order = " ".join(name.upper() for name in required)
        raise ConfigError(f"{missing[0]}: required; usage: jrlhf {command} {order} [--FLAG VALUE ...]")
    config = apply_flags(cls(**dict.fromkeys(required, "")), flags)
    check(config)
    return config


def required_fields(cls: Any) -> list[str]:
    """Return the names of the fields without a default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def read_flags(
    command: str, argv: Sequence[str], types: Mapping[str, Any], *, positional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Read the texts of `--a.b VALUE`, `--a.b=VALUE`, `--list X Y` and `--switch [true|false]` by path; the last one
    wins."""
    flags: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "-" or not argument.startswith("-"):
            name = next((name for name in positional if name not in flags), None)
            if name is None:
                raise ConfigError(f"{argument}: unexpected argument; write a value after its flag, as in --seed 1")
            flags[name] = [argument]
            continue
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in types or not flag.startswith("--"):
            guess = did_you_mean(flag.lstrip("-"), types, "--") if len(flag) > 2 else ""
            # The top level has sections as well, so a list of its flags alone would mislead.
            hint = guess if "." in name or "did you mean" in guess else f"; jrlhf {command} --help lists them"
            raise ConfigError(f"{flag}: unknown flag{hint}")
        if equals:
            flags[name] = [value]
        elif get_origin(types[name]) is tuple:
            flags[name] = []
            while rest and not rest[0].startswith("--"):
                flags[name].append(rest.pop(0))
        elif types[name] in (bool, Switch):
            values = ("true", "false") if types[name] is bool else ("true", "false", "auto")
            flags[name] = [rest.pop(0)] if rest and rest[0].lower() in values else ["true"]
        elif rest and not rest[0].startswith("--"):
            flags[name] = [rest.pop(0)]
        else:
            raise ConfigError(f"{flag}: expected a value")
    return flags


def print_help(command: str, cls: type, about: str) -> None:
    """Print every flag of a command with its type, meaning and default, from the dataclasses and their docstrings."""
    import tyro

    if issubclass(cls, Config):
        parts = sections(command)
        config_help = tyro.conf.arg(
            help="YAML file of the run; the command of one stage ignores the others.", metavar="FILE.yaml"
        )
        shown: list[Any] = [("config", Annotated[str, config_help], field(default=""))]
        for f in fields(Config):
            if f.name not in parts:
                suppressed = Annotated[f.type, tyro.conf.Suppress]  # pyright: ignore[reportInvalidTypeForm]
                shown += [(f.name, suppressed, field(default_factory=f.default_factory))]
        cls = make_dataclass("Shown", shown, bases=(cls,), frozen=True)
        about += " Flags override the YAML, which overrides the defaults below."
    elif required := required_fields(cls):
        named = " ".join(f"--{name} {name.upper()}" for name in required)
        about += f" Positional arguments also work as flags: {named}."
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
    except SystemExit as exit_:
        if exit_.code:
            raise


def _sources_help(info: Any) -> Any:
    """Show sources in the help as the YAML writes them."""
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
