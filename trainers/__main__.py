"""The `mmfast` command. Exit code 2 and one line for what can be known before data is touched, 1 for failures at run time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mmfast.spec import Alignment, Data, System, nearest, to_dict

from .checkpoint import RunError


class UsageError(RunError):
    """Known to be wrong before anything ran."""


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)  # --step is not --steps

    def error(self, message: str) -> None:
        raise UsageError(message)


def parser() -> Parser:
    top = Parser(prog="mmfast", description="Fast multimodal ops, and the systems built on them.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what)

    add("list", "every bundled recipe").add_argument("--markdown", action="store_true", help="as a Markdown table")
    for name, what in (
        ("show", "all fields of a recipe"),
        ("train", "train a recipe; any field can be set as --name.of.field VALUE"),
        ("plan", "parameters and memory of a recipe, and what to change where it does not fit; loads nothing"),
    ):
        sub = add(name, what)
        sub.add_argument(
            "recipe", help="a name from `mmfast list`, a Python file that defines RECIPE, a --print-config file, or a run folder"
        )
        sub.add_argument("--tiny", action="store_true", help="at a size that two CPU cores train in minutes, on built-in data")
        sub.add_argument(
            "--config", metavar="FILE", action="append", default=[], help="YAML or JSON with fields to change; may be repeated"
        )
        sub.add_argument("--print-config", action="store_true", help="print the resolved recipe as YAML, in the form that --config takes")
        if name == "plan":
            sub.add_argument(
                "--gpu-memory", type=float, metavar="GIB", help="memory of one device: says what to change where a stage does not fit"
            )
            sub.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share a batch (torchrun)")
            sub.add_argument("--length", type=int, metavar="T", help="positions of a row (default: the stage's max_length)")
        if name == "train":
            sub.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/NAME)")
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--steps", type=int, help="at most so many steps a stage")
            sub.add_argument("--resume", action="store_true", help="continue the run in --out")
            sub.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: at the end of a stage)")
            sub.add_argument("--data", metavar="FILE", help="JSON or JSONL records instead of the recipe's data")
            sub.add_argument("--images", metavar="DIR", help="folder of the records' pictures (default: beside the file)")
            sub.add_argument("--on-bad-record", choices=("fail", "skip"), default="fail", help="an unreadable picture or faulty record")
            sub.add_argument("--keep", type=int, default=2, metavar="K", help="checkpoints to keep")
            sub.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps between measures and samples during training")
            sub.add_argument("--track", default="", metavar="LIST", help="also log to some of tensorboard,wandb,trackio")
            sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="short for --compute.device")
            sub.add_argument("--dry-run", action="store_true", help="resolve and print the recipe, train nothing")
            sub.add_argument("--quiet", action="store_true", help="no progress bars")
    sub = add("diff", "the fields in which two recipes differ")
    for side in ("a", "b"):
        sub.add_argument(side, metavar=side.upper(), help="a recipe as in `mmfast show`: a name, a file or a run folder")
    sub.add_argument("--tiny", action="store_true", help="of their tiny forms (of names and Python files)")
    sub = add("eval", "measure a trained run on held-out scenes of the shapes world")
    sub.add_argument("run", type=Path)
    sub.add_argument("--scenes", type=int, default=500)
    sub = add("report", "write report.html of a run folder")
    sub.add_argument("runs", type=Path, nargs="+")
    sub = add("demo", "train, align and measure a tiny multimodal model; ends with a page to look at")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, help="at most so many steps a stage: a smoke test")
    sub.add_argument("--scenes", type=int, default=500, help="held-out scenes to measure on")
    sub.add_argument("--quiet", action="store_true", help="no progress bars")
    sub = add("bench", "benchmark the kernels against PyTorch and their best peers (from a source checkout)")
    sub.add_argument("op", nargs="?", help="one op, say vq")
    add("env", "versions, build and machine")
    return top


COMMANDS = ("list", "show", "train", "plan", "diff", "eval", "chat", "export", "report", "demo", "bench", "env")
FLAGS = (
    "tiny", "config", "print-config", "out", "seed", "steps", "resume", "save-every", "data", "images", "on-bad-record", "device", "dry-run",
    "quiet", "keep", "eval-every", "track", "gpu-memory", "processes", "length",
)  # fmt: skip


def resolve(args: argparse.Namespace, rest: list[str]):
    """The recipe of a command line, all layers applied and checked; with --print-config it is printed, and that is all."""
    from dataclasses import replace

    import mmfast

    from . import config

    try:
        mmfast.build_info()
    except ValueError as error:  # a wrong MMFAST_CPU_ISA is told here rather than by the first op
        raise RunError(str(error)) from None
    recipe, problems = config.layered(args.recipe, tiny=args.tiny, files=args.config, rest=rest, flags=FLAGS)
    if getattr(args, "device", None):
        recipe = replace(recipe, compute=replace(recipe.compute, device=args.device))
    if getattr(args, "data", None):
        if not Path(args.data).exists():
            problems.append(f"data file {args.data} does not exist")
        given = dict(path=args.data, images=args.images, on_bad_record=args.on_bad_record)
        if isinstance(recipe, Alignment):
            recipe = replace(recipe, data=replace(recipe.data, **given))
        else:  # a mixture gives way to the one set
            own = [s.data if isinstance(s.data, Data) else Data(s.data.name) for s in recipe.stages]
            stages = [replace(s, data=replace(d, **given)) if s.objective == "lm" else s for s, d in zip(recipe.stages, own, strict=True)]
            recipe = replace(recipe, stages=tuple(stages))
    recipe = config.resolved(recipe, problems, processes=getattr(args, "processes", None))
    if args.print_config:
        from .demo import cap

        print(config.to_yaml(cap(recipe, getattr(args, "steps", None))), end="")
        raise SystemExit(0)
    return recipe


def train(args: argparse.Namespace, rest: list[str]) -> None:
    from .demo import cap

    try:
        recipe = cap(resolve(args, rest), args.steps)
        if args.dry_run:
            print(json.dumps(to_dict(recipe), indent=2))
            return
        from mmfast.data import chat

        from .checkpoint import Run
        from .loop import Options
        from .place import find
        from .supervised import Session, train_system
        from .trackers import open_trackers

        for name in ("save_every", "keep"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
        system, out = system_of(recipe), args.out or Path("runs") / recipe.name
        place = find(recipe.compute, args.device)
        session = Session(system, seed=args.seed, place=place)  # builds and checks the model before anything is written
        for template in [recipe.template] if isinstance(recipe, Alignment) else [stage.template for stage in recipe.stages]:
            chat.check_template(template)
        run = Run(out, resume=args.resume, keep=args.keep, main=place.main)
        stored = to_dict(recipe) | {"seed": args.seed}
        if args.resume and (out / "recipe.json").exists():
            check_same(json.loads((out / "recipe.json").read_text()), stored, out)
        options = Options(
            seed=args.seed, resume=args.resume, save_every=args.save_every, quiet=args.quiet, compute=recipe.compute, place=place,
            trackers=open_trackers(args.track, out, stored) if place.main else (),
        )  # fmt: skip
    except UsageError:
        raise
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error

    check_records(recipe, session)
    run.write_json("recipe.json", stored)
    if isinstance(recipe, Alignment):
        align(recipe, run, options)
    else:
        finish(recipe, train_system(recipe, run, options=options), run)


def system_of(recipe) -> System:
    return recipe.policy if isinstance(recipe, Alignment) else recipe


def align(recipe: Alignment, run, options) -> None:
    """The base from the cache, measured, aligned, measured again."""
    from .evaluate import Exam
    from .preference import train_alignment
    from .supervised import base_model, cache_folder

    session, _ = base_model(recipe.policy, options=options, cache=cache_folder(run.folder))
    exam = Exam(session)
    before = exam(session, template=recipe.template)
    run.write_json("before.json", before[0])
    finish(recipe, train_alignment(recipe, session, run, options=options), run, exam, before[1])


def finish(recipe, session, run, exam=None, before: dict | None = None) -> None:
    """Measures, samples and the page of a trained model; one process does it."""
    from . import report
    from .demo import pick_samples, write_samples
    from .evaluate import Exam

    if not run.main:
        return
    exam = exam or Exam(session)
    template = recipe.template if isinstance(recipe, Alignment) else recipe.stages[-1].template
    measured, details = exam(session, template=template)
    run.write_json("eval.json", measured)
    captions = {"before": before["captions"], "after": details["captions"]} if before else {"model": details["captions"]}
    write_samples(run.folder, session, exam, pick_samples(session, exam, before or details, details), captions)
    report.write(run.folder / "report.html", report.run_page(run.folder))
    print({k: round(measured[k], 4) for k in ("chair_s", "chair_i", "recall", "pope_adversarial_accuracy")})
    print(f"open {run.folder / 'report.html'}")


def check_records(recipe, session) -> None:
    """Faults in the user's own records are named before the first step, not when the stage that reads them begins."""
    if isinstance(recipe, Alignment):
        if recipe.data.path is not None and recipe.data.on_bad_record == "fail":
            from .preference import make_source

            make_source(session, recipe)
        return
    for stage in recipe.stages:
        if stage.data.path is not None and stage.data.on_bad_record == "fail":
            session.source(stage.data, stage.template, stage.max_length)


def check_same(before: dict, now: dict, out: Path) -> None:
    """A run is continued with the recipe and seed it was begun with: another would join two curves that do not belong together."""
    from .describe import flat

    left, right = flat(before), flat(json.loads(json.dumps(now)))
    # How a run is computed may change between two parts of it; what it learns from may not.
    left, right = ({k: v for k, v in d.items() if ".compute." not in f".{k}"} for d in (left, right))
    changed = [f"{key} was {left.get(key)!r}, now {right.get(key)!r}" for key in {**left, **right} if left.get(key) != right.get(key)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UsageError(f"{out} was begun with another recipe: {changed[0]}{more}; give the same options or choose another --out")


def evaluate(args: argparse.Namespace) -> None:
    from . import config
    from .checkpoint import Run, load_model
    from .evaluate import Exam
    from .supervised import Session

    try:
        saved = json.loads((args.run / "recipe.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{args.run} is no run folder: recipe.json is missing or unreadable") from error
    try:
        recipe = config.from_dict({k: v for k, v in saved.items() if k != "seed"}, str(args.run / "recipe.json"))
    except RunError as error:
        raise UsageError(str(error)) from error
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    run = Run(args.run, resume=True)
    last = run.last_checkpoint()
    if last is None:
        raise UsageError(f"{args.run} holds no intact checkpoint to measure")
    session = Session(system, seed=saved.get("seed", 0))
    load_model(session.model, last[1])
    template = recipe.template if isinstance(recipe, Alignment) else recipe.stages[-1].template
    measured, _ = Exam(session, scenes=args.scenes)(session, template=template)
    run.write_json("eval.json", measured)
    print(json.dumps(measured, indent=2))


def bench(args: argparse.Namespace) -> int:
    import subprocess

    folder = Path("bench/ops")
    known = sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))
    if not known:
        raise UsageError("benchmarks live in the source checkout: run `mmfast bench` in its top folder")
    if args.op is not None and args.op not in known:
        raise UsageError(f"no benchmark of {args.op!r}{nearest(args.op, known)}; there are {', '.join(known)}")
    target = folder / f"bench_{args.op}.py" if args.op else folder
    return subprocess.call([sys.executable, "-m", "pytest", "-s", "-q", str(target), "-o", "python_files=bench_*.py"])


def environment() -> int:
    """What a report of a fault should hold; exit code 1 where something here keeps mmfast from running."""
    from . import describe

    text, healthy = describe.environment()
    print(text)
    return 0 if healthy else 1


def plan(args: argparse.Namespace, rest: list[str]) -> None:
    try:
        from .plan import page

        print(page(resolve(args, rest), gpu_memory=args.gpu_memory, processes=args.processes, length=args.length))
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error


def run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    args, rest = parser().parse_known_args(argv)
    if args.command is None:
        parser().print_help()
        return 2
    if rest and args.command not in ("train", "show", "plan"):
        raise UsageError(f"{args.command}: unknown option {rest[0]!r}")
    for name in ("steps", "scenes", "processes", "length"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
    if args.command == "train":
        train(args, rest)
    elif args.command == "demo":
        from .demo import run_demo

        if args.out.exists() and not args.out.is_dir():
            raise UsageError(f"output folder {args.out} is a file; choose another --out")
        if args.out.exists() and any(args.out.iterdir()):
            raise UsageError(f"output folder {args.out} exists and is not empty; choose another --out or remove it")
        run_demo(args.out, seed=args.seed, steps=args.steps, scenes=args.scenes, quiet=args.quiet)
    elif args.command == "eval":
        evaluate(args)
    elif args.command == "report":
        from . import report

        for folder in args.runs:
            if not (folder / "recipe.json").exists():
                raise UsageError(f"{folder} is no run folder: it holds no recipe.json")
            print(report.write(folder / "report.html", report.run_page(folder)))
    elif args.command == "bench":
        return bench(args)
    elif args.command == "plan":
        plan(args, rest)
    elif args.command == "env":
        return environment()
    else:
        from . import config, describe

        try:
            if args.command == "list":
                print(describe.table(args.markdown))
            elif args.command == "show":
                print(describe.show(resolve(args, rest), config.load_recipe(args.recipe)))
            else:
                print(describe.diff(*(config.load_recipe(side, tiny=args.tiny) for side in (args.a, args.b))))
        except RunError as error:
            raise UsageError(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> None:
    try:
        code = run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"mmfast: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `mmfast list | head`
        sys.stderr.close()  # the interpreter would complain about the pipe once more on its way out
        code = 0
    except (RunError, ValueError, OSError) as error:
        print(f"mmfast: {error}", file=sys.stderr)
        code = 1
    except ImportError as error:
        print(f"mmfast: {error}; the trainers need their extra: pip install 'mmfast[train]'", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("mmfast: interrupted; the last checkpoint is kept, --resume continues from it", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
