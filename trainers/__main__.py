"""The `mmfast` command. Exit code 2 and one line for what can be known before data is touched, 1 for failures at run time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mmfast.spec import nearest, to_dict

from .checkpoint import RunError, write_atomically


class UsageError(RunError):
    """Known to be wrong before anything ran."""


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)  # --step is not --steps

    def error(self, message: str) -> None:
        raise UsageError(message)


def add_decoding(sub: argparse.ArgumentParser, most: int) -> None:
    """The options of an answer that is decoded, None where they are not given."""
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help=f"of an answer (default {most})")
    sub.add_argument("--beams", type=int, metavar="N", help="texts that are followed side by side (default 1)")
    sub.add_argument("--length-penalty", type=float, metavar="X", help="of beams: more favours longer answers (default 1)")
    sub.add_argument(
        "--no-repeat-ngram-size", type=int, dest="no_repeat", metavar="N", help="no run of N tokens comes twice (default 0: any may)"
    )
    sub.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 what was said becomes rarer (default 1)")


DECODING = {
    "max_new_tokens": "max-new-tokens", "beams": "beams", "length_penalty": "length-penalty", "no_repeat": "no-repeat-ngram-size",
    "repetition_penalty": "repetition-penalty",
}  # fmt: skip


def decoding(args: argparse.Namespace) -> dict:
    """The options of decoding that are given, by their names in ``mmfast.models.generate``."""
    given = {name: value for name in DECODING if (value := getattr(args, name)) is not None}
    for name, least in (("max_new_tokens", 1), ("beams", 1), ("no_repeat", 0)):
        if given.get(name, least) < least:
            raise UsageError(f"--{DECODING[name]} {given[name]}: expected at least {least}")
    if not 0 < given.get("repetition_penalty", 1) < float("inf"):
        raise UsageError(f"--repetition-penalty {given['repetition_penalty']}: expected a number above 0")
    if "length_penalty" in given and given.get("beams", 1) == 1:
        raise UsageError("--length-penalty is about beams; add --beams N")
    return given


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
            sub.add_argument("--on-bad-record", choices=("fail", "skip"), help="an unreadable picture or faulty record (default fail)")
            sub.add_argument("--keep", type=int, default=2, metavar="K", help="checkpoints to keep")
            sub.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps between measures and samples during training")
            sub.add_argument("--track", default="", metavar="LIST", help="also log to some of tensorboard,wandb,trackio")
            sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="short for --compute.device")
            sub.add_argument("--eval-data", metavar="FILE", help="what to measure the trained model on, as --data of eval")
            sub.add_argument("--dry-run", action="store_true", help="print the recipe and what is supervised, train nothing")
            sub.add_argument("--quiet", action="store_true", help="no progress bars")
    sub = add("diff", "the fields in which two recipes differ")
    for side in ("a", "b"):
        sub.add_argument(side, metavar=side.upper(), help="a recipe as in `mmfast show`: a name, a file or a run folder")
    sub.add_argument("--tiny", action="store_true", help="of their tiny forms (of names and Python files)")
    sub = add("eval", "measure a trained run: on held-out scenes of the shapes world, on easy-vqa's test part, or on records")
    sub.add_argument("run", type=Path)
    sub.add_argument("--scenes", type=int, default=500)
    sub.add_argument(
        "--data",
        metavar="FILE",
        help="records to measure loss, right answers and found pictures on; or VIST's or VisDial's own file (FROMAGe)",
    )
    sub.add_argument("--images", metavar="DIR", help="folder of the records' pictures (default: beside the file)")
    sub.add_argument(
        "--shots", metavar="YAML", help="how few-shot episodes are asked, as in '{prompt: flamingo, shots: 4, induction: true}'"
    )
    sub.add_argument("--generate", action="store_true", help="decode the records' answers: VQA accuracy, places, RUN/predictions.jsonl")
    add_decoding(sub, 64)
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"))
    sub = add("chat", "talk with a trained run about pictures; without --prompt, in a conversation")
    sub.add_argument("run", type=Path)
    sub.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    sub.add_argument("--prompt", help="one question, answered and done")
    add_decoding(sub, 256)
    sub.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest word each time")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"))
    sub = add("export", "write a trained run as a Hugging Face folder that the stock classes load")
    sub.add_argument("run", type=Path)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it too")
    sub = add("report", "write report.html of a run folder")
    sub.add_argument("runs", type=Path, nargs="+")
    sub = add("demo", "train, align and measure a tiny multimodal model; ends with a page to look at")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, help="at most so many steps a stage: a smoke test")
    sub.add_argument("--scenes", type=int, default=500, help="held-out scenes to measure on")
    sub.add_argument("--quiet", action="store_true", help="no progress bars")
    sub = add("bench", "benchmark kernels and trainers against PyTorch and their best peers (from a source checkout)")
    sub.add_argument("op", nargs="?", help="one of them, say vq, or trainer")
    add("env", "versions, build and machine")
    return top


COMMANDS = ("list", "show", "train", "plan", "diff", "eval", "chat", "export", "report", "demo", "bench", "env")
FLAGS = (
    "tiny", "config", "print-config", "out", "seed", "steps", "resume", "save-every", "data", "images", "on-bad-record", "device", "dry-run",
    "quiet", "keep", "eval-every", "eval-data", "track", "gpu-memory", "processes", "length",
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
    if args.command == "train":
        recipe = _with_records(recipe, args, problems)
    recipe = config.resolved(recipe, problems, processes=getattr(args, "processes", None))
    if args.print_config:
        from .demo import cap

        print(config.to_yaml(cap(recipe, getattr(args, "steps", None))), end="")
        raise SystemExit(0)
    return recipe


def _with_records(recipe, args: argparse.Namespace, problems: list[str]):
    """The recipe with --data, --images and --on-bad-record over it; the last two also count for records that the recipe names itself."""
    import glob

    from .runs import data_of, not_at_hand, with_data

    for path in filter(None, (args.data, args.eval_data)):
        if not (Path(path).expanduser().exists() or path.startswith("hub:") or glob.has_magic(path)):
            problems.append(f"data file {path} does not exist")
    given = {name: getattr(args, name) for name in ("images", "on_bad_record") if getattr(args, name) is not None}
    if args.data:
        return with_data(recipe, path=args.data, **{"images": None, **given})
    if args.eval_data:
        given.pop("images", None)  # whose pictures those are
    if given and all(data.path is None for data in data_of(recipe)):
        problems.append(f"--{next(iter(given)).replace('_', '-')} is about records, and none are given; add --data FILE")
        return recipe
    if not (args.dry_run or args.print_config) and (absent := not_at_hand(recipe)):  # said before any weights are read
        problems.append(absent)
    return with_data(recipe, **given) if given else recipe


def train(args: argparse.Namespace, rest: list[str]) -> None:
    from dataclasses import replace

    from .demo import cap

    try:
        from . import runs

        recipe = cap(resolve(args, rest), args.steps)
        start = runs.Start(
            out=args.out or Path("runs") / recipe.name,
            **{k: getattr(args, k) for k in ("seed", "resume", "save_every", "keep", "eval_every", "track", "quiet")},
        )  # fmt: skip
        if args.dry_run:
            shown = runs.preview(recipe, colour=sys.stdout.isatty())  # what is wrong with the data is all that is said
            print(json.dumps(to_dict(recipe), indent=2))
            print(shown, file=sys.stderr)
            return
        if args.eval_data is not None:
            start = replace(start, eval_data=runs.to_measure(recipe, args.eval_data, args.images))
        go = runs.prepare(recipe, start)
    except UsageError:
        raise
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error
    go()


def opened(folder: Path, device: str | None):
    """A run's session and recipe for the commands that use one."""
    from mmfast.spec import Compute

    from .place import find
    from .runs import open_run

    try:
        return open_run(folder, place=find(Compute(), device))
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error


def evaluate(args: argparse.Namespace) -> None:
    from . import benchmarks, records
    from .checkpoint import Run
    from .runs import measure, to_measure

    options = decoding(args)
    if args.generate and args.data is None:
        raise UsageError("--generate is about records, and none are given; add --data FILE")
    if options and not args.generate:
        raise UsageError(f"--{DECODING[next(iter(options))]} is about answers that are decoded; add --generate")
    if args.shots is not None and args.data is None:
        raise UsageError("--shots is about records, and none are given; add --data FILE")
    session, recipe = opened(args.run, args.device)
    if args.generate and records.compares(recipe):
        raise UsageError(f"{args.run}: its last stage compares pictures with texts and answers nothing; leave --generate out")
    try:
        exam = None if args.data is None else benchmarks.opened(session, args.data, args.images)
        if exam is not None and (args.generate or args.shots is not None):
            raise UsageError(f"{args.data}: {exam.name} has its own prompts and decodes nothing; leave --generate and --shots out")
        given = None if args.data is None or exam is not None else to_measure(recipe, args.data, args.images, args.shots)
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error
    measured, _, _ = measure(session, recipe, scenes=args.scenes)
    run = Run(args.run, resume=True)
    if exam is not None:
        measured |= exam.take()
    if given is not None:
        told, said = records.measure(session, recipe, given, decoding=options if args.generate else None)
        measured |= told
        if args.generate:
            write_atomically(run.folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in said).encode())
            print(f"answers in {run.folder / 'predictions.jsonl'}", file=sys.stderr)
    if not measured and given is None:
        raise UsageError(f"{args.run} was trained on data of your own: give records to measure on with --data FILE")
    run.write_json("eval.json", measured)
    print(json.dumps(measured, indent=2))


def talk(args: argparse.Namespace) -> None:
    from . import chat
    from .runs import template_of

    given = decoding(args)
    if given.get("beams", 1) > 1 and args.temperature:
        raise UsageError("--beams follows the likeliest texts, and --temperature draws others; leave one of them out")
    session, recipe = opened(args.run, args.device)
    options = dict(template=template_of(recipe), temperature=args.temperature, top_p=args.top_p, seed=args.seed, **given)

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    if args.prompt is not None:
        chat.chat(session, args.image, args.prompt, stream=write, **options)
        print()
    else:
        if sys.stdin.isatty():
            print("ask; " + ", ".join(chat.COMMANDS.values()))
        chat.converse(session, chat.read_lines("> " if sys.stdin.isatty() else ""), write, images=args.image, **options)


def export(args: argparse.Namespace) -> None:
    from .export import export as write

    session, recipe = opened(args.run, "cpu")
    path = args.run / "eval.json"
    metrics = json.loads(path.read_text()) if path.exists() else None
    print(write(session, recipe, args.out, metrics=metrics, push_to=args.push_to_hub))


def bench(args: argparse.Namespace) -> int:
    import subprocess

    known = {p.stem.removeprefix("bench_"): p for p in sorted(Path("bench").glob("*/bench_*.py"))}
    if not known:
        raise UsageError("benchmarks live in the source checkout: run `mmfast bench` in its top folder")
    if args.op is not None and args.op not in known:
        raise UsageError(f"no benchmark of {args.op!r}{nearest(args.op, known)}; there are {', '.join(known)}")
    target = known[args.op] if args.op else "bench"
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
    elif args.command == "chat":
        talk(args)
    elif args.command == "export":
        export(args)
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
        code = getattr(error, "code", 1)
    except ImportError as error:
        print(f"mmfast: {error}; the trainers need their extra: pip install 'mmfast[train]'", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("mmfast: interrupted; the last checkpoint is kept, --resume continues from it", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
