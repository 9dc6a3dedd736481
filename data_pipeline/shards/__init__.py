"""Token ids on disk: Megatron and raw shards, the manifest that lists them, their writer and their checksums."""
