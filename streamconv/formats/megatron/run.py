"""The run behind Megatron's rank files: its parallel sizes, and where each file stands in it.

Folder names give the numbers of a rank, ``args`` in the files and their content what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import BadInputError
from streamconv.formats.megatron.names import unwrapped
from streamconv.formats.megatron.stages import Member, Rank, expert_tensor_ranks
from streamconv.formats.replicas import Replicas
from streamconv.torchfile.rankfile import Stored
from streamconv.torchfile.stagefile import StageFile

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
EMBEDDING = "embedding.word_embeddings.weight"


def check_claim(
    name: str, args: Mapping[str, object], found: int, files: Sequence[StageFile]
) -> None:
    """Refuse files in which the arguments say another ``name`` than what was ``found``."""
    claimed = args.get(name)
    if type(claimed) is int and claimed != found:
        raise BadInputError(
            "the rank files contradict the arguments that are saved in them",
            where=str(files[0].path.parent.parent),
            expected=f"{name} = {claimed}",
            found=str(found),
            hint="rank files are missing, or belong to another run",
        )


@dataclass(frozen=True)
class Run:
    """The parallel sizes of a run, and the rank of each of its files."""

    ranks: tuple[Rank, ...]
    tp: int
    pp: int
    vpp: int
    ep: int
    args: Mapping[str, object]
    folder: Path

    @staticmethod
    def of(
        names: Sequence[tuple[int, ...]], files: Sequence[StageFile], args: Mapping[str, object]
    ) -> Run:
        """Return the run whose rank folders have the numbers ``names``."""
        folder = files[0].path.parent.parent
        has_pp = len(names[0]) > 1
        if len(names[0]) == 2 and _means_experts(names, files, args, folder):
            names, has_pp = [(tp, 0, ep) for tp, ep in names], False
        ranks = tuple(Rank(*(*n, 0, 0)[:3]) for n in names)
        virtual = {len(f.stages) for f in files}
        if len(virtual) > 1:
            raise BadInputError(
                "the rank files have different numbers of virtual pipeline stages",
                where=str(folder),
                found=", ".join(map(str, sorted(virtual))),
            )
        sizes = [max(r.tp for r in ranks), max(r.pp for r in ranks), max(r.ep for r in ranks)]
        tp, pp, ep = (n + 1 for n in sizes)
        run = Run(ranks, tp, pp, virtual.pop(), ep, args, folder)
        run._check(files, has_pp)
        return run

    def _check(self, files: Sequence[StageFile], has_pp: bool) -> None:
        for size, found in (("tp", self.tp), ("pp", self.pp), ("ep", self.ep)):
            check_claim(SIZES[size], self.args, found, files)
        if self.vpp > 1:
            check_claim(SIZES["vpp"], self.args, self.vpp, files)
        there = {(r.tp, r.pp) for r in self.ranks}
        missing = [
            f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if has_pp else "")
            for pp in range(self.pp)
            for tp in range(self.tp)
            if (tp, pp) not in there
        ]
        if missing:
            raise BadInputError(
                f"the files of {len(missing)} of {self.tp * self.pp} ranks are missing",
                where=str(self.folder),
                expected=", ".join(missing[:8]),
                hint="copy the missing folders; the checkpoint cannot be converted without them",
            )

    def check_places(self, files: Sequence[StageFile]) -> None:
        """Refuse files that lie in each other's folders, where Megatron-LM's arguments show it.

        They tell each process's own number, of which tensor parallelism is the last digit, and which
        grows with the pipeline stage. Tools that write all files from one process give all the same.
        """
        numbers = [n for f in files if type(n := f.args.get("rank")) is int]
        if len(set(numbers)) < len(files):
            return
        before: dict[tuple[int, int], int] = {}
        for rank, number, file in sorted(
            zip(self.ranks, numbers, files, strict=True), key=lambda placed: placed[0]
        ):
            least = before.get((rank.tp, rank.ep), -1)
            before[rank.tp, rank.ep] = number
            if number % self.tp != rank.tp or number < least:
                raise BadInputError(
                    "a rank file lies in the folder of another rank",
                    where=str(file.path),
                    expected=f"a process of tensor-parallel rank {rank.tp} and pipeline rank {rank.pp}",
                    found=f"process {number} of the run",
                    hint="files were swapped or renamed: copy the checkpoint again",
                )

    def sizes(self, etp: int) -> dict[str, object]:
        """Return the parallel sizes under the names that the arguments have."""
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": etp}
        return {SIZES[k]: n for k, n in sizes.items() if k != "vpp" or n > 1}

    def stages(
        self, files: Sequence[StageFile]
    ) -> list[list[tuple[int, Rank, Mapping[str, Stored]]]]:
        """Return what each stage holds, in the order of the model's layers."""
        return [
            [
                (number, rank, _unwrapped(file, v))
                for number, (rank, file) in enumerate(zip(self.ranks, files, strict=True))
                if rank.pp == p
            ]
            for v in range(self.vpp)
            for p in range(self.pp)
        ]

    def etp(self, stages: Sequence[Sequence[Member]], compare: Replicas) -> int:
        """Return the size of expert tensor parallelism, from the arguments or the experts' bytes."""
        if not any(m.experts for stage in stages for m in stage):
            return 1
        claimed = self.args.get(SIZES["etp"])
        if type(claimed) is not int or claimed < 1:
            return expert_tensor_ranks(stages, self.tp, compare)
        if self.tp % claimed:
            raise BadInputError(
                "cannot determine a file's expert-tensor-parallel rank: no folder name says it",
                where=str(self.folder),
                expected="an expert tensor parallel size that divides the tensor parallel size",
                found=f"{claimed} and {self.tp}",
                hint="files of several ranks overwrote each other when this was saved",
            )
        return claimed


def _means_experts(
    names: Sequence[tuple[int, ...]],
    files: Sequence[StageFile],
    args: Mapping[str, object],
    folder: Path,
) -> bool:
    """Whether the one number after the tensor-parallel rank is the expert-parallel one."""
    pp, ep = args.get(SIZES["pp"]), args.get(SIZES["ep"])
    if type(pp) is int and type(ep) is int:
        if (pp > 1) == (ep > 1):
            raise BadInputError(
                "the folder names contradict the arguments that are saved in the files",
                where=str(folder),
                expected=f"folders of {pp} pipeline and {ep} expert-parallel ranks",
                found=f"mp_rank_{names[0][0]:02d}_{names[0][1]:03d}",
            )
        return ep > 1
    # Pipeline stages differ in their names: the first has the embedding, the last the final norm.
    held = {
        frozenset(n for stage in f.stages for n in stage if ".experts." not in n) for f in files
    }
    whole = any(n.endswith(EMBEDDING) for n in next(iter(held))) and any(
        is_final_norm(n) for n in next(iter(held))
    )
    return len(held) == 1 and whole


def is_final_norm(name: str) -> bool:
    """Whether ``name`` is the norm behind the last layer."""
    return name.endswith(("decoder.final_layernorm.weight", "decoder.final_norm.weight"))


def _unwrapped(file: StageFile, virtual: int) -> dict[str, Stored]:
    """Return the tensors of a stage by their names in the model, without wrappers."""
    stage = file.stages[virtual]
    result = {unwrapped(name): stored for name, stored in stage.items()}
    if len(result) != len(stage):
        raise BadInputError(
            "parameters of one name, apart from what wrappers put before it",
            where=str(file.path),
            found=f"{len(stage)} parameters of {len(result)} names",
        )
    return result
