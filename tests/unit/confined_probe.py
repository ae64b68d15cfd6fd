"""A confined process that was taken over: what it may leave instead of a report."""

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from audit_plugin.confined import FILES, JOB, REFUSAL, RESULT
from audit_plugin.confined.jobs import AuditJob, Refusal, RepairJob, RepairResult
from audit_plugin.errors import UsageError
from audit_plugin.records import ARRAYS_FILE, RECORD_FILE, read_record, write_record
from audit_plugin.types import AuditReport, Isolation, Rate, RepairReport, Verdict


class Fires:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('/tmp/backdoor-audit-fired', 'w')",)


def main(kind: str, work: Path) -> None:
    """What to do is the command in the job: a confined process sees nothing else of its caller."""
    job = read_record({"AuditJob": AuditJob, "RepairJob": RepairJob}[kind], work / JOB)
    common = job.common if isinstance(job, RepairJob) else job
    result = work / RESULT
    report = read_record(AuditReport, common.clean)
    match common.command:
        case "forged":
            other = replace(common.model, digest="sha256:other", pinned_uri="models:/other/1")
            forged = replace(report, model=other, policy={}, policy_digest="sha256:0", seed=99, command="rm -rf")
            write_record(replace(forged, isolation=Isolation("a bank vault", True, True, "")), result)
        case "nothing":
            return
        case "no JSON":
            write_record(report, result)
            (result / RECORD_FILE).write_text("{")
        case "deep":
            write_record(report, result)
            (result / RECORD_FILE).write_text("[" * 100_000)
        case "other type":
            write_record(Rate(1.0, 1, 1, 0.0, 1.0), result)
        case "other field":
            write_record(report, result)
            document = json.loads((result / RECORD_FILE).read_text())
            document["decision"]["verdict"] = "splendid"
            (result / RECORD_FILE).write_text(json.dumps(document))
        case "number for text":
            write_record(report, result)
            document = json.loads((result / RECORD_FILE).read_text())
            document["tool_version"] = 1
            (result / RECORD_FILE).write_text(json.dumps(document))
        case "objects":
            write_record(report, result)
            np.savez(result / ARRAYS_FILE, array0=np.array([Fires()], dtype=object))
        case "bomb":
            write_record(report, result)
            with zipfile.ZipFile(result / ARRAYS_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("array0.npy", bytes(64 * 1024**2))
        case "link":
            write_record(report, result)
            (result / RECORD_FILE).unlink()
            (result / RECORD_FILE).symlink_to("/etc/hostname")
        case "linked folder":
            result.symlink_to("/etc")
        case "foreign error":
            write_record(Refusal("SystemExit", "\x1b[2J gone"), work / REFUSAL)
        case "own error":
            write_record(Refusal("CleanSetError", "\x1b[2J no images" + "!" * 10_000), work / REFUSAL)
        case "words":
            words = [
                "{",
                "[]",
                "null",
                '{"stage": 1}',
                '{"share": "x"}',
                '{"share": 7}',
                '{"share": NaN}',
                "[" * 60_000,
                '{"stage": "\\u001b[2J"}',
                '{"log": "\\u001b[2J hi", "level": "WARNING"}',
                '{"log": "low", "level": "NONE"}',
            ]
            sys.stdout.write("\n".join(words) + "\n")
            write_record(report, result)
        case "fires":
            raise UsageError("not caught in here")
        case "linked file" | "two files" | "no file":
            rate = Rate(1.0, 1, 1, 0.0, 1.0)
            write_record(RepairResult(report, RepairReport("prune", 0, 1, rate, rate, rate, rate)), result)
            (work / FILES).mkdir()
            if common.command == "linked file":
                (work / FILES / "model.onnx").symlink_to("/etc/hostname")
            if common.command == "two files":
                (work / FILES / "model.onnx").touch()
                (work / FILES / "model.pt2").touch()
        case "verdict":
            write_record(replace(report, decision=replace(report.decision, verdict=Verdict.PASS)), result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
