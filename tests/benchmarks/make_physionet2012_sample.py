"""Make the bundled sample of PhysioNet 2012 from the whole of set A.

For maintainers; users get the result with the package.

    python tests/benchmarks/make_physionet2012_sample.py DATA_HOME

DATA_HOME holds set A in any layout that `fetch_physionet2012` reads.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import ehrfuse.datasets.physionet2012 as source

TARGET = Path(source.__file__).parent / "data"


def main(home):
    names = ["set-a.parquet", "set-a", "set-a.tar.gz", "set-a.zip"]
    long = source._read_long(source._find(home, names))
    lines = source._find(home, ["Outcomes-a.txt"]).read_text().splitlines()
    records = {int(line.partition(",")[0]): line for line in lines[1:]}
    chosen = source._sample_records(records)

    long = long[long["RecordID"].isin(chosen)]
    # Sorted this way the file is a tenth smaller; the order within a minute is rebuilt on loading.
    long = long.astype({"variable": str})
    long = long.sort_values(["RecordID", "variable", "minutes"], kind="stable")
    table = pa.table(
        {
            "RecordID": pa.array(long["RecordID"], pa.int32()),
            "minutes": pa.array(long["minutes"], pa.uint16()),
            "variable": pa.array(long["variable"], pa.string()).dictionary_encode(),
            "value": pa.array(long["value"], pa.float64()),
        }
    )
    path = TARGET / "physionet2012_sample.parquet"
    # One row group: values are stored once, in its dictionary, and repeat as small numbers.
    pq.write_table(table, path, compression="zstd", compression_level=22, row_group_size=len(table))
    outcomes = "\n".join([lines[0], *(records[record] for record in chosen)]) + "\n"
    (TARGET / "physionet2012_outcomes.txt").write_text(outcomes)
    deaths = sum(records[record].endswith(",1") for record in chosen)
    print(f"{len(chosen)} stays, {deaths} deaths, {len(table)} values, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
