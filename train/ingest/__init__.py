"""Ingest: tar shards as img2dataset writes them become a PairStore (train.data.pair_store).

    config        the flags
    sources       what --shards means: the list of source shards, their names, and how to open one as a seekable file
    source_table  img2dataset's parquet beside a tar: only for the report
    tar_index     where each member of a tar lies, grouped by key, and where a torn tar ends
    decode        one sample: a pair to keep, or the reason to reject it
    reencode      pictures made smaller on the way
    samples       one source shard as pairs and rejections, in the order of its keys
    worker        one source shard into one fragment folder, written aside
    commits       those folders made durable and given their names, while the workers go on
    survey        the same without writing: --dry-run
    plan          what an unfinished --out folder was started with, so that only the same command goes on with it
    pool          many shards at once, with the progress bar
    numbering     pair ids into the fragments
    parts         one data set ingested by several programs
    finish        ledger, index, manifest
    bench         how much all this costs beside reading and decoding alone

Each source shard is its own unit of work: its fragment is written aside by a worker process, synced and renamed by the
main process, so a killed run loses at most the shards in flight and the few whose commit was under way. Ids follow from
shard names and keys alone. Memory holds the offsets of one tar, one MDS file and one row group of the ledger a worker,
and a few hundred bytes a source shard in the main process: it grows neither with the number of pairs nor, to speak of,
with that of shards.
"""
