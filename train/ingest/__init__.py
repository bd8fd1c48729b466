"""Ingest: tar shards as img2dataset writes them become a PairStore (train.data.pair_store).

    sources     what --shards means: the list of source shards, their names, and how to open one as a seekable file
    tar_index   where each member of a tar lies, grouped by key, and where a torn tar ends
    decode      one sample: a pair to keep, or the reason to reject it
    worker      one source shard into one fragment folder, in the order of its keys
    plan        what an unfinished --out folder was started with, so that only the same command goes on with it
    pool        fragments of many shards at once, with the progress bar
    finish      pair ids into the fragments, ledger, index, manifest

Each source shard is its own unit of work: its fragment is written aside and renamed when whole, so a killed run loses at
most the shards in flight. Ids follow from shard names and keys alone.
"""
