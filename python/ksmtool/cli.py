# SPDX-License-Identifier: MIT
"""The command line: parse, call, print. Modules that cost start-up time are imported where used."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ksmtool import complete
from ksmtool.errors import ExitStatus, KsmtoolError

if TYPE_CHECKING:
    from ksmtool.consent import Company
    from ksmtool.kernel import Ksm
    from ksmtool.ksmd import Change, Settled


def _version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:  # as it is at the Tab key
        import subprocess  # noqa: PLC0415

        from ksmtool import install  # noqa: PLC0415

        # The wrapper's, so that there is one number, also where no metadata of a wheel is.
        shown = subprocess.run([install.wrapper(), "--version"], stdout=subprocess.PIPE, check=True)
        click.echo(f"ksmtool {shown.stdout.decode().split()[-1]}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
def cli() -> None:
    """Let Linux merge equal memory of programs (KSM), and see what that saves.

    Pages are merged between all programs that are opted in: use it for programs that trust each
    other, since timing tells one what is in the other's memory.
    """


@cli.command(cls=complete.Wrapping)
@click.option(
    "--method",
    type=click.Choice(["auto", "prctl", "madvise"]),
    default="auto",
    show_default=True,
    help="How to opt in; auto takes the prctl where the kernel has it.",
)
@click.option("--explain", is_flag=True, help="Say on stderr what is done and why, then do it.")
@click.option("-q", "--quiet", is_flag=True, help="No line when KSM is off or nothing can be done.")
@click.option(
    "--group",
    "group_name",
    metavar="NAME",
    shell_complete=complete.group,
    help="Give COMMAND the secret memory layout and hash seeds that all programs so started share: "
    "their equal data is equal bytes then. For programs that trust each other.",
)
@click.option("--group-required", is_flag=True, help="Do not run COMMAND without that layout.")
@click.option("--no-hash-seed", is_flag=True, help="Leave hash seeds alone.")
@click.option("--follow", is_flag=True, help="Let what COMMAND starts join the group, too.")
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, shell_complete=complete.command
)
def wrap(
    method: str,
    explain: bool,
    quiet: bool,
    group_name: str | None,
    group_required: bool,
    no_hash_seed: bool,
    follow: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND opted in to KSM.

    This process becomes COMMAND, so the exit status is COMMAND's, 126 if it cannot be run and 127
    if it is not found. A unit file or a script had better call ksm-wrapper, which starts faster.
    """
    from ksmtool import group as groups  # noqa: PLC0415
    from ksmtool import wrap as wrapping  # noqa: PLC0415

    wanted = None
    if group_name is not None:
        groups.require_valid(group_name)
        wanted = groups.Wanted(group_name, group_required, not no_hash_seed, follow)
    for option, given in (
        ("--group-required", group_required),
        ("--no-hash-seed", no_hash_seed),
        ("--follow", follow),
    ):
        if given and wanted is None:
            raise click.UsageError(f"{option} is about a group: it takes --group NAME, too.")
    wrapping.run(command, method, explain, quiet, wanted=wanted)


@cli.command("try", cls=complete.Wrapping)
@click.option(
    "-n",
    "copies",
    type=click.IntRange(1, 10000),
    default=10,
    show_default=True,
    help="How many copies to run; {i} in COMMAND is the number of the copy, from 1.",
)
@click.option(
    "--arms",
    default="plain,wrap",
    show_default=True,
    metavar="ARM,...",
    help="What to compare: plain (without us), wrap (opted in), group (opted in, with the secret "
    "layout and hash seeds of a group of its own).",
)
@click.option("--follow", is_flag=True, help="Let what the copies start join the group, too.")
@click.option(
    "--ready-file",
    type=click.Path(),
    metavar="PATH",
    help="A copy is ready when this exists; {i} as above.",
)
@click.option(
    "--ready-port",
    metavar="PORT",
    help="... when 127.0.0.1 accepts at this port: 8080, or 8000+{i}. "
    "With neither: when memory has stopped growing.",
)
@click.option("--drive", metavar="CMD", help="Shell command to run when merging has settled.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds to get ready, and again to settle, for each arm.",
)
@click.option(
    "--pages-to-scan",
    type=click.IntRange(1, 1_000_000),
    default=5000,
    show_default=True,
    help="ksmd's pages per 20 ms, if KSM is off now; if it is on, its rate stays.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of the table.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE", help="Also draw a bar chart: .svg or .png."
)
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, shell_complete=complete.command
)
def try_(
    copies: int,
    arms: str,
    follow: bool,
    ready_file: str | None,
    ready_port: str | None,
    drive: str | None,
    timeout: float,
    pages_to_scan: int,
    as_json: bool,
    plot: str | None,
    command: tuple[str, ...],
) -> None:
    """Run copies of COMMAND with and without KSM and measure what it saves and costs.

    Each copy runs in a session of its own and knows its number as $KSMTOOL_COPY, there with leading
    zeros: a variable of another length is a difference in memory. KSM is turned on for as long as
    the trial takes, and every setting is put back, also after Ctrl-C.
    """
    from pathlib import Path  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415

    from ksmtool import report, trial  # noqa: PLC0415

    if plot is not None:
        from ksmtool import plot as plotting  # noqa: PLC0415

        if Path(plot).suffix not in (".svg", ".png"):
            raise click.BadParameter("FILE has to end in .svg or .png", param_hint="--plot")
        if not os.access(Path(plot).parent, os.W_OK):
            raise KsmtoolError(f"Cannot write {plot}: its folder is missing or not writable.")
        plotting.require()
    if math.isnan(timeout):
        raise click.BadParameter("nan is no time", param_hint="--timeout")
    if ready_port is not None:
        try:
            trial.ready_ports(ready_port, copies)
        except ValueError as error:
            raise click.BadParameter(
                f"{ready_port} is not PORT or BASE+{{i}}", param_hint="--ready-port"
            ) from error
    names = arms.split(",")
    if follow and "group" not in names:
        raise click.UsageError("--follow is about the arm group.")
    chosen = trial.arms_named(names, command, follow)
    options = trial.Options(
        copies=copies,
        ready_file=ready_file,
        ready_port=ready_port,
        timeout=timeout,
        pages_to_scan=pages_to_scan,
        drive=drive,
    )
    with _progress() as say:
        result = trial.run(command, chosen, options, say)
    if as_json:
        click.echo(report.as_json(result))
    else:
        report.print_table(result, Console())
    if plot is not None:
        plotting.save(result, Path(plot))


_BY = ["process", "app", "unit", "container", "user"]
_SORTS = ["saved", "profit", "merged", "anonymous", "rss", "processes", "name"]


@cli.command()
@click.option(
    "--by",
    type=click.Choice(_BY),
    default="process",
    show_default=True,
    help="What to put together: an app is an executable, a unit is one of systemd.",
)
@click.option(
    "--sort",
    type=click.Choice(_SORTS),
    default="saved",
    show_default=True,
    help="Numbers from the largest, names from A.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="At most N rows, the last of which stands for all others; 20, with --json all.",
    metavar="N",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of text.")
def status(by: str, sort: str, limit: int | None, as_json: bool) -> None:
    """Say whether KSM is on, what it saves and costs, and who saves how much.

    Saved is memory that is not used because of merging, shared out among those that have it in
    common; merged counts each page in each process. Profit is saved less the kernel's records.
    ksmd's CPU time is watched for a second. Root sees every process, others their own.
    """
    import time  # noqa: PLC0415

    from ksmtool import facts, overview, usage  # noqa: PLC0415
    from ksmtool.kernel import Ksm  # noqa: PLC0415

    ksm = Ksm()
    before = facts.sample(ksm)
    machine = facts.gather()
    if machine.available:
        time.sleep(max(0.0, before.at + _WATCHED_SECONDS - time.monotonic()))
    pace = facts.pace(before, facts.sample(ksm), machine)
    if as_json:
        rows = usage.rows(machine.processes, by, sort, limit)
        click.echo(overview.as_json(machine, pace, rows, by))
        return
    from rich.console import Console  # noqa: PLC0415

    rows = usage.rows(machine.processes, by, sort, limit or 20)
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # for a pipe, nothing is cut off
    for label, text in overview.lines(machine, pace):
        click.echo(f"{label + ':':12}{text}")
    if machine.available:
        console.print(overview.table(rows, by, console.width))
        for note in overview.notes(machine, usage.total(rows)):
            click.echo(note)


_WATCHED_SECONDS = 1.0


@cli.command()
@click.option("--by", type=click.Choice(_BY), default="process", show_default=True)
@click.option("--sort", type=click.Choice(_SORTS), default="saved", show_default=True)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=86_400),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
def top(by: str, sort: str, interval: float) -> None:
    """Show what status says, live, and what was saved and what ksmd took all the while.

    Keys: s sorts by another column, g puts together by something else, / filters by a part of the
    name (Enter keeps the filter, Escape drops it), q ends.
    """
    from ksmtool import top as live  # noqa: PLC0415

    if not math.isfinite(interval):
        raise click.BadParameter(f"{interval} is no time", param_hint="--interval")
    live.run(interval, live.View(by, sort))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of text.")
@click.argument(
    "subject",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[PID | -- CMD [ARG]...]",
    shell_complete=complete.command,
)
def doctor(as_json: bool, subject: tuple[str, ...]) -> None:
    """Say what keeps KSM from saving memory here, and the commands that change it.

    Alone it looks at the machine; with PID also at that process, with CMD at a program that is yet
    to be started, and that is not run. Nothing is changed. The exit status is 1 if something is a
    problem, 0 if there are notes at most.
    """
    from ksmtool import doctor as doctors  # noqa: PLC0415
    from ksmtool import doctor_report as report  # noqa: PLC0415
    from ksmtool import examine  # noqa: PLC0415

    # A program that is called like a number has a path.
    pid = int(subject[0]) if len(subject) == 1 and _is_pid(subject[0]) else None
    found = examine.examine(pid, () if pid is not None else subject)
    findings = doctors.diagnose(found)
    if as_json:
        click.echo(report.as_json(found, findings))
    else:
        for line in report.lines(found, findings):
            click.echo(line)
    if not doctors.healthy(findings):
        raise SystemExit(ExitStatus.FAILED)


def _is_pid(word: str) -> bool:
    # int() takes no thousands of digits.
    return word.isascii() and word.isdigit() and len(word) < 20 and int(word) > 0


@cli.command()
@click.option(
    "--textfile",
    type=click.Path(),
    metavar="FILE",
    help="Write FILE for node_exporter's textfile collector, in one go, instead of stdout. It "
    "has to end in .prom.",
)
@click.option(
    "--by",
    type=click.Choice(_BY[1:]),
    multiple=True,
    default=["app"],
    show_default=True,
    help="What there are series for; may be given several times.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="At most N series of each metric, the last of which stands for all others.",
)
def export(textfile: str | None, by: tuple[str, ...], limit: int) -> None:
    """Print metrics for Prometheus: what KSM saves and costs, and who saves how much.

    OpenMetrics to stdout; to a file the older text format, which is what node_exporter reads there.
    Root sees every process, others their own, and how many they do not see.
    """
    from pathlib import Path  # noqa: PLC0415

    from ksmtool import export as exporting  # noqa: PLC0415
    from ksmtool import facts  # noqa: PLC0415

    machine = facts.gather()
    if textfile is None:
        # Bytes: OpenMetrics is UTF-8 whatever the locale.
        click.echo(exporting.openmetrics(machine, by, limit), nl=False)
    else:
        exporting.write(Path(textfile), exporting.classic(machine, by, limit))


def _share(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float:
    """Return `10` and `10%` as a part of 1."""
    if text is None:
        return 1.0
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 0 < percent <= 100:
        raise click.BadParameter(f"{text} is no part of a whole: 10 and 10% are a tenth.")
    return percent / 100


@cli.command()
@click.option("--app", metavar="NAME", help="All processes of this program.")
@click.option("--all", "every", is_flag=True, help="All processes but those the policy leaves out.")
@click.option(
    "--sample",
    "share",
    metavar="PERCENT",
    callback=_share,
    help="Count only this part of the contents (10 or 10%) and conclude the rest.",
)
@click.option(
    "--again",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Look twice, that long apart, and leave out what changed: KSM does not merge that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of tables.")
@click.argument("pids", nargs=-1, type=click.IntRange(min=1), metavar="[PID]...")
def estimate(
    app: str | None,
    every: bool,
    share: float,
    again: float,
    as_json: bool,
    pids: tuple[int, ...],
) -> None:
    """Say what KSM could save of running processes as they are, before anything is enabled.

    Their anonymous pages are read and compared by a hash; nothing of them is changed. That takes
    root, or processes of one's own.
    """
    from rich.console import Console  # noqa: PLC0415

    from ksmtool import estimate as estimates  # noqa: PLC0415
    from ksmtool import estimate_report as report  # noqa: PLC0415
    from ksmtool import policy as policies  # noqa: PLC0415
    from ksmtool import process  # noqa: PLC0415

    if (app is not None) + every + bool(pids) != 1:
        raise click.UsageError("Either PIDs, or --app NAME, or --all.")
    if math.isnan(again) or math.isinf(again):
        raise click.BadParameter(f"{again} is no time", param_hint="--again")
    rules = None
    if every:
        rules = replace(policies.load(), off=False)
        wanted = estimates.everything()
        if process.hides():
            click.echo("Warning: /proc hides the processes of others (hidepid).", err=True)
    else:
        wanted = estimates.named(pids) if app is None else estimates.of_program(app)
    with _progress() as say:
        found = estimates.measure(wanted, rules, share, again, say)
    if as_json:
        click.echo(report.as_json(found))
    else:
        report.print_tables(found, Console())


@cli.group()
def group() -> None:
    """Look at the groups of processes that share a secret layout, or forget one."""


@group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of the table.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete.group)
def group_list(as_json: bool, names: tuple[str, ...]) -> None:
    """List this user's groups: their members alive, their memory, and what merging spares.

    anon. MB is what the members would use if no page of theirs were shared; used MB is what they
    do use; saved MB is the part of the difference that merging accounts for, not fork.
    """
    from rich.console import Console  # noqa: PLC0415

    from ksmtool import group as groups  # noqa: PLC0415
    from ksmtool import report  # noqa: PLC0415

    found = groups.listed(names)
    if as_json:
        click.echo(report.groups_as_json(found))
    else:
        report.print_groups(found, Console())


@group.command("forget")
@click.argument("name", shell_complete=complete.group)
def group_forget(name: str) -> None:
    """Remove the secret of the group NAME.

    Its members keep their layout until they end. What is started in a group of that name later gets
    a new one, and shares nothing with them.
    """
    from ksmtool import group as groups  # noqa: PLC0415

    alive = groups.forget(name)
    click.echo(f"Forgot group {name}: the next program started in it draws a new layout.")
    if alive:
        keep = "1 process keeps" if alive == 1 else f"{alive} processes keep"
        click.echo(f"{keep} the old one until {'it ends' if alive == 1 else 'they end'}.")


@cli.command("global-enable")
@click.option(
    "--method",
    type=click.Choice(["auto", "ld.so.preload", "systemd"]),
    default="auto",
    show_default=True,
    help="How; auto takes systemd where that is enough, and says why.",
)
@click.option("--dry-run", is_flag=True, help="Try it and say what would change; change nothing.")
@click.option("--yes", is_flag=True, help="Agree to what is said about security.")
@click.option(
    "--logins",
    is_flag=True,
    help="systemd: also what people start after a login, sudo, ssh and browsers included.",
)
@click.option(
    "--force", is_flag=True, help="Also where virtual machines or containers of tenants run."
)
def global_enable(method: str, dry_run: bool, yes: bool, logins: bool, force: bool) -> None:
    """Opt in every program of this machine, but for those that the policy leaves out.

    Before anything is written, a shell, a set-uid program, Python, systemd and a program of each
    architecture run with the change in a private mount namespace; afterwards they run for real,
    and if one does not do what it did before, the change is taken back.
    """
    from ksmtool import consent, ldpreload, machine, systemd  # noqa: PLC0415
    from ksmtool.wrap import probe  # noqa: PLC0415

    about_systemd = click.UsageError("--logins is about the method systemd.")
    if logins and method == machine.PRELOAD:
        raise about_systemd
    with machine.alone():
        kernel = probe()
        # By either method: systemd's drop-ins, too, need a package that takes them back.
        entry = ldpreload.entry_for(machine.library(kernel))
        choice = machine.choose(method, kernel, systemd.obstacle, machine.enabled())
        if logins and choice.method != machine.SYSTEMD:
            raise about_systemd
        click.echo(f"Method: {choice.method} ({choice.why}).")
        for problem in ldpreload.problems():
            click.echo(f"note: {problem}", err=True)
        company = consent.company()
        if company.tenants and not force:
            raise KsmtoolError(
                f"This machine runs {' and '.join(company.tenants)}: its memory would merge with "
                "that of everything else.",
                "If all of them are your own, use --force.",
            )
        if choice.method == machine.PRELOAD:
            _enable_by_preload(entry, company, dry_run, yes)
        else:
            _enable_by_systemd(logins, company, dry_run, yes)


def _enable_by_preload(entry: str, company: Company, dry_run: bool, yes: bool) -> None:
    from ksmtool import ldpreload, machine  # noqa: PLC0415

    tried = machine.rehearse(entry)
    click.echo(f"Tried in a mount namespace: programs start and print the same with {entry}.")
    candidate = ldpreload.candidate(entry)
    if candidate == ldpreload.content():
        click.echo("Enabled already: nothing to change.")
    elif dry_run:
        click.echo(f"/{ldpreload.FILE} would be:")
        click.echo(candidate, nl=False)
    else:
        _require_consent(company, yes)
        click.echo(f"{machine.enable_by_preload(tried)}.")
        click.echo("Programs are opted in when they start, from now on; services: restart them.")
        _warn_of_ksm()


def _enable_by_systemd(logins: bool, company: Company, dry_run: bool, yes: bool) -> None:
    from ksmtool import machine, systemd  # noqa: PLC0415

    wanted = machine.drop_ins(logins)
    if not systemd.changes(wanted):
        click.echo("Enabled already: nothing to change.")
    elif dry_run:
        for drop_in in wanted:
            click.echo(f"/{drop_in.path}: MemoryKSM={'yes' if drop_in.on else 'no'}")
    else:
        _require_consent(company, yes)
        changed = machine.enable_by_systemd(wanted)
        click.echo(f"{len(changed)} drop-ins of systemd changed below /etc/systemd.")
        click.echo("Each service is opted in when it is restarted, or at the next boot.")
        left_out = [drop_in.unit for drop_in in wanted if not drop_in.on]
        click.echo(f"Left out: {', '.join(left_out) or 'none'}.")
        click.echo("Services installed later: run this again, or all of them are opted in.")
        click.echo(
            "Logins: from the next one on."
            if logins
            else "What people start after a login is not opted in; --logins changes that."
        )
        _warn_of_ksm()


def _warn_of_ksm() -> None:
    from ksmtool.kernel import Ksm  # noqa: PLC0415
    from ksmtool.wrap import ksm_warning  # noqa: PLC0415

    warning = ksm_warning(Ksm())
    if warning:
        click.echo(warning, err=True)


def _require_consent(company: Company, yes: bool) -> None:
    """Say what it gives away, and go on only with a yes."""
    from ksmtool import consent  # noqa: PLC0415

    click.echo(consent.FIVE_LINES)
    if company.people > 1:
        click.echo(f"note: programs of {company.people} ordinary users run now.", err=True)
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise KsmtoolError("Nothing was changed: that takes a yes.", "--yes gives it.")
    if click.prompt("Type yes to go on", default="no", show_default=False) != "yes":
        raise KsmtoolError("Nothing was changed.")


@cli.command("global-disable")
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
def global_disable(dry_run: bool) -> None:
    """Take back what global-enable did, by either method."""
    from ksmtool import ldpreload, machine, systemd  # noqa: PLC0415

    with machine.alone():
        if dry_run:
            planned = [f"/{ldpreload.FILE}: {one.name}" for one in ldpreload.entries() if one.ours]
            planned += [f"/{drop_in.path}" for drop_in in systemd.present()]
            for one in planned:
                click.echo(f"{one} would be removed")
        else:
            planned = machine.disable()
            for line in planned:
                click.echo(line)
    if not planned:
        click.echo("Nothing of ours was enabled.")
    elif not dry_run:
        still = machine.processes().still
        some = ", ".join(f"{name} {pid}" for pid, name in sorted(still)[:8])
        if still:
            click.echo(
                f"{len(still)} other running processes are still opted in, by us or by others, or "
                f"have the library, until they end: {some}{', ...' if len(still) > 8 else ''}."
            )


@cli.command("global-status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of text.")
def global_status(as_json: bool) -> None:
    """Say what is enabled for the whole machine, and what that comes to, measured."""
    from ksmtool import machine, report  # noqa: PLC0415

    found = machine.status()
    if as_json:
        click.echo(report.status_as_json(found))
    else:
        for line in report.status_lines(found):
            click.echo(line)


@cli.group()
def policy() -> None:
    """Look at the policy: which programs are left out of KSM."""


@policy.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of lines.")
@click.argument("programs", nargs=-1, metavar="[PROGRAM]...", shell_complete=complete.program)
def policy_check(as_json: bool, programs: tuple[str, ...]) -> None:
    """Say what policy is in force, what is wrong with it, and what becomes of each PROGRAM.

    A PROGRAM is a path, or a name to look up in PATH. The exit status is 1 if something in the
    files is malformed, not trusted, cannot be read, or looks like a mistake.
    """
    from ksmtool import policy as policies  # noqa: PLC0415
    from ksmtool import report  # noqa: PLC0415

    found = policies.load()
    found = replace(found, problems=[*found.problems, *policies.doubts(found)])
    outcomes = [policies.outcome(found, name, os.environ.get("PATH")) for name in programs]
    missing = [name for name, outcome in zip(programs, outcomes) if outcome is None]
    if missing:
        raise click.BadParameter(f"There is no program {missing[0]}.", param_hint="PROGRAM")
    known = [outcome for outcome in outcomes if outcome is not None]
    show = report.policy_as_json if as_json else report.policy_as_text
    click.echo(show(found, known))
    if found.problems:
        raise SystemExit(ExitStatus.FAILED)


@cli.command("kernel-enable")
@click.option(
    "--profile",
    "name",
    type=click.Choice(["gentle", "balanced", "fast"]),
    help="How fast ksmd scans; balanced, or as it is enabled already.",
)
@click.option("--cpu", type=click.IntRange(1, 100), help="ksmd's limit, in percent of one CPU.")
@click.option("--settle", is_flag=True, help="Scan as fast as it goes first, until it has settled.")
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
def kernel_enable(name: str | None, cpu: int | None, settle: bool, dry_run: bool) -> None:
    """Switch KSM on, tune it, and keep it on over reboots.

    What was set before is kept for kernel-disable. If another manager sets KSM again and again,
    that is said, with the ways out, and nothing is changed.
    """
    from ksmtool import boot, install, ksmd, state  # noqa: PLC0415
    from ksmtool.kernel import Ksm, ended_as_interrupted, undisturbed  # noqa: PLC0415

    ksm = Ksm()
    ksmd.require_host()
    for owner in ksmd.require_ours():
        click.echo(f"note: {owner.name} {owner.does}.", err=True)
    if not dry_run:
        ksmd.require_root()
    install.require_trusted_ksmtool()
    known = state.read()
    if name is None and known is not None:
        name, cpu = known.profile, known.cpu if cpu is None else cpu
    wanted = state.State(name or "balanced", cpu, {})
    init = boot.init_system()
    files = boot.files(init, install.ksmtool())
    if dry_run:
        _print_changes(ksmd.planned(ksm, wanted.settings(ksm)))
        for path in boot.planned(files) if files else ():
            click.echo(f"/{path} would be written")
        return
    with ksm.locked():
        with undisturbed():
            changes, paths = ksmd.enable(wanted.profile, cpu, ksm, files)
        for path in paths:
            click.echo(f"wrote /{path}")
        _print_changes(changes)
        if files is None and not boot.installed(init):
            click.echo(
                f"To keep it over reboots, put this into /{boot.LOCAL}, which has to be executable "
                f"and to begin with #!/bin/sh: {install.ksmtool()} kernel-apply"
            )
        if not wanted.advised(ksm):
            click.echo(
                "note: the kernel's advisor can be switched on at the next boot only; "
                "until then the rate is fixed.",
                err=True,
            )
        if settle:
            with ended_as_interrupted(), _progress() as say:
                result = ksmd.settle(ksm, wanted, _SETTLE_SECONDS, say)
            _print_settled(result, wanted.profile)


_SETTLE_SECONDS = 600


def _print_settled(result: Settled, name: str) -> None:
    known = result.cpu_seconds is not None
    cpu = f", for {result.cpu_seconds:.1f} s of ksmd's CPU time" if known else ""
    said = {
        "settled": f"Settled after {result.seconds:.0f} s",
        "late": f"Still merging after {result.seconds:.0f} s",
        "idle": "Nothing to merge: no process is opted in (ksmtool wrap, ksmtool global-enable)",
    }[result.end]
    click.echo(
        f"{said}: KSM saves {result.saved / 1e6:.0f} MB on this machine{cpu}. "
        f"It scans at the rate of {name} now."
    )


def _print_changes(changes: Sequence[Change]) -> None:
    for change in changes:
        click.echo(f"{change.name}: {change.old} -> {change.new}")
    if not changes:
        click.echo("KSM is set so already.")


@cli.command("kernel-apply", hidden=True)
def kernel_apply() -> None:
    """Set what kernel-enable has kept: what runs at boot."""
    from ksmtool import ksmd  # noqa: PLC0415
    from ksmtool.kernel import Ksm  # noqa: PLC0415

    ksm = Ksm()
    ksmd.require_host()
    ksmd.require_root()
    with _locked_if_it_can_be(ksm):
        _print_changes(ksmd.apply_state(ksm))


@contextmanager
def _locked_if_it_can_be(ksm: Ksm) -> Iterator[None]:
    """Have KSM to oneself, but do not depend on it: any user can hold the lock."""
    with ExitStack() as stack:
        try:
            stack.enter_context(ksm.locked(seconds=5))
        except KsmtoolError as error:
            click.echo(
                f"note: {error.message} It will set KSM back to what it found; "
                "see ksmtool kernel-status then.",
                err=True,
            )
        yield


@cli.command("kernel-status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema 1) instead of text.")
def kernel_status(as_json: bool) -> None:
    """Say whether KSM is on and at which rate, by whom, and whether it stays so."""
    from ksmtool import ksmd, report  # noqa: PLC0415
    from ksmtool.kernel import Ksm  # noqa: PLC0415

    found = ksmd.status(Ksm())
    if as_json:
        click.echo(report.ksmd_as_json(found))
    else:
        for line in report.ksmd_lines(found):
            click.echo(line)


@cli.command("kernel-disable")
@click.option(
    "--unmerge",
    is_flag=True,
    help="Also give each program pages of its own again; takes the memory that was saved.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
def kernel_disable(unmerge: bool, dry_run: bool) -> None:
    """Set KSM as kernel-enable found it, and keep that over reboots."""
    from ksmtool import boot, ksmd, profile, state  # noqa: PLC0415
    from ksmtool.kernel import Ksm, undisturbed  # noqa: PLC0415

    ksm, init = Ksm(), boot.init_system()
    try:
        known = state.read()
    except KsmtoolError as error:
        click.echo(f"note: {error.message} The kernel's defaults are what is set.", err=True)
        known = state.State("balanced", None, profile.DEFAULTS)
    if dry_run:
        paths = boot.ours(init)
        if known is None and not paths:
            click.echo("Nothing of kernel-enable is there.")
        else:
            _print_changes(ksmd.planned(ksm, known.found if known else {}))
        if unmerge:
            click.echo("Every merged page would be unmerged.")
        for path in paths:
            click.echo(f"/{path} would be removed")
        return
    ksmd.require_root()
    with _locked_if_it_can_be(ksm) if ksm.available() else nullcontext(), undisturbed():
        changes, paths = ksmd.disable(known, unmerge, ksm, init)
    for path in paths:
        click.echo(f"removed /{path}")
    if known is None and not paths and not changes:
        click.echo("Nothing of kernel-enable is there.")
    else:
        _print_changes(changes)
    if boot.files(init, "") is None and boot.installed(init):
        click.echo(f"Take the line with kernel-apply out of /{boot.LOCAL}, too.")


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show what goes on, on stderr and only if that is a terminal."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _text, _done: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda text, done: progress.update(task, description=text, completed=done)


def main() -> None:
    """Run the command line and exit; the one place where errors become words and a status."""
    if sys.stdout is None:  # closed by whoever started us; click would fail at its first word
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name is whatever bytes somebody likes
        sys.stdout.reconfigure(errors="replace")
    try:
        status = cli.main(standalone_mode=False)
    except KsmtoolError as error:
        click.echo(f"ksmtool: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("ksmtool: Interrupted.", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    except OSError as error:
        # Most likely the output cannot be written: /dev/full, a closed pipe. What of it is left in
        # the buffer must not fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if sys.stderr is not None:
            print(f"ksmtool: {error.strerror or error}.", file=sys.stderr)
        sys.exit(ExitStatus.FAILED)
    sys.exit(status)
