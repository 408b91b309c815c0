//! The table of settings. A setting is written here and nowhere else.
//!
//! The table feeds the struct [`Config`] with its defaults, parsing and printing, ranges and
//! choices, environment variables, the configuration file, the command line, the Python signatures
//! with their types and docs, docs/settings.md, and the list of values that a saved state compares.
//! Run `make generate` after a change. A row reads:
//!
//! ```text
//! /// Meaning, in sentences for users.
//! name: Type = default, Role, form, [Python classes beside `Loader` that take it];
//! ```
//!
//! `Content` settings say how a state compares them ([`Compared`]). Forms hold the accepted range
//! or choices ([`super::forms`]). Checks of several settings together stand in [`super::config`].

use super::config::{
    Balance, BatchFormat, DataFormat, Epochs, Io, LayoutKind, OnError, Overflow, PackedBy, Phase, Remainder, Shuffle,
    Skip, Split, Targets,
};
use super::forms::{
    Addresses, Columns, Cpus, EpochCount, IdDtype, MixtureText, Name, Optional, Paths, ShuffleKind, Skips, StoredDtype,
    Switch, bytes, column, few_tokens, folder, number, signed_number, text, token_id, tokens,
};
use super::setting::Compared::{Always, AsOpened, ByCorpus, ByProgress, OrZero, WithBlocks, WithLanes};
use super::setting::Role::{Content, Grouping, Operational, Peers, Rank};
use super::setting::{FieldOf, Setting, Taker, settings};
use crate::tokens::Dtype;

settings! {
    /// The corpus: a file, a folder, a glob pattern, or a list of these, in order.
    data: Vec<String> = Vec::new(),
        Content(ByCorpus(&["fingerprint", "shards", "sequences", "growth"], "a corpus may move without becoming another")),
        Paths, [TokenDataset];

    /// Several corpora with weights, in place of `data`. It has `sources` (each with `name`,
    /// `data`, `weight`, and `epochs` as a limit), `stages` that change the weights, and
    /// `exhausted`, the rule for a source that has ended.
    mixture: Option<String> = None,
        Content(ByCorpus(&["mixture"], "only the part that has begun is compared")),
        Optional(MixtureText), [TokenDataset];

    /// Expected format of the files.
    format: DataFormat = DataFormat::Auto,
        Content(AsOpened), Name, [TokenDataset];

    /// Column that holds the tokens. `none` takes the first of `input_ids`, `tokens`, `token_ids`
    /// and `ids` that has lists of ids. If none has lists, it takes the first with an id in each
    /// row.
    token_column: Option<String> = None,
        Content(AsOpened), Optional(column()), [TokenDataset];

    /// Further columns to deliver. A column of lists has one value for each token: labels, masks,
    /// weights, or any numbers. `labels` replace the labels made of the tokens. In padding,
    /// `labels` are `ignore_index` and all other columns are 0. A column of numbers or strings has
    /// one value for each document, and a batch one for each stretch in `cu_seqlens`.
    fields: Vec<String> = Vec::new(),
        Content(Always), Columns, [TokenDataset];

    /// Type of the ids in raw files, which have no header that says it. Files of all other formats
    /// say it themselves.
    bin_dtype: Option<Dtype> = None,
        Content(Always), Optional(StoredDtype), [TokenDataset];

    /// Number of ids of the tokenizer. A batch with another id is an error with file, block and
    /// row. `none` checks only that no id is negative.
    vocab_size: Option<u64> = None,
        Operational, Optional(number(1, 1 << 31).called("an integer from 1 to 2^31")), [TokenDataset, DataLoader];

    /// Last id of each document in files of ids without document lengths: raw files, files of
    /// llm.c, and NumPy arrays of a single axis. It belongs to the document that it ends. `none`
    /// makes each of these files a single document, which only `concat` takes.
    document_end_id: Option<u32> = None,
        Content(Always), Optional(token_id()), [TokenDataset];

    /// Tokens per sequence.
    seq_len: u64 = 2048,
        Content(Always), few_tokens(1, 1 << 32), [TokenDataset];

    /// Arrays of a batch.
    targets: Targets = Targets::Labels,
        Content(Always), Name, [TokenDataset];

    /// Label of places that are no target, such as padding. Give the same number to the loss.
    /// Values of a column `labels` are delivered as they are stored.
    ignore_index: i64 = -100,
        Content(Always), signed_number(), [TokenDataset];

    /// Id put before every non-empty document.
    bos_id: Option<u32> = None,
        Content(Always), Optional(token_id()), [TokenDataset];

    /// Id put after every non-empty document.
    eos_id: Option<u32> = None,
        Content(Always), Optional(token_id()), [TokenDataset];

    /// Way to make rows from documents.
    layout: LayoutKind = LayoutKind::Concat,
        Content(Always), Name, [TokenDataset];

    /// Places where `concat` cuts the joined documents.
    phase: Phase = Phase::Fixed,
        Content(Always), Name, [TokenDataset];

    /// Adds the starts of documents to the batch: `position_ids`, `doc_ids`, `cu_seqlens` and
    /// `max_seqlen`. No label then asks for the first token of a document. `none` means `true` for
    /// `pack`, with `packed_by`, and for columns with one value for each document. Else it means
    /// `false`.
    boundaries: Option<bool> = None,
        Content(Always), Optional(Switch), [TokenDataset];

    /// Column that says where documents begin in rows of files that were packed before. For `rows`
    /// and `pad`.
    packed_by: PackedBy = PackedBy::None,
        Content(Always), Name, [TokenDataset];

    /// Rule for documents that are longer than a row, in `pack` and `pad`.
    overflow: Overflow = Overflow::Split,
        Content(Always), Name, [TokenDataset];

    /// Limit of documents in a row of `pack`.
    max_docs_per_row: Option<u64> = None,
        Content(OrZero), Optional(number(1, 1 << 31)), [TokenDataset];

    /// In `pack`, every document begins at a multiple of this number.
    pack_align: u64 = 1,
        Content(Always), number(1, 1 << 20), [TokenDataset];

    /// Sorts rows of `pad` by length, inside runs of this many positions of an epoch, so that a
    /// batch has rows of similar length. Needs `pad_to_multiple`.
    bucket: Option<u64> = None,
        Content(OrZero), Optional(number(2, 1 << 24)), [TokenDataset];

    /// Order of an epoch. `global` is one permutation of all sequences. `block` permutes chunks,
    /// then sequences within windows. `true` is `global` for files that are read in place, and
    /// `block` for files that have to be decoded.
    shuffle: Shuffle = Shuffle::Off,
        Content(Always), ShuffleKind, [TorchParameter];

    /// Key of the order, together with the epoch. `forebay.torch.DataLoader` takes it from the
    /// sampler or the generator if you give none.
    seed: u64 = 0,
        Content(Always), number(0, u64::MAX), [DataLoader];

    /// Tokens in a chunk. Block shuffling permutes the chunks of the corpus.
    chunk_tokens: u64 = 4 << 20,
        Content(WithBlocks), tokens(1, 1 << 48, "1Mi"), [DataLoader];

    /// Tokens in the windows of all lanes together. Block shuffling permutes the sequences of a
    /// window.
    window_tokens: u64 = 16 << 20,
        Content(WithBlocks), tokens(1, 1 << 48, "16Mi"), [DataLoader];

    /// Virtual shards that block shuffling interleaves. World sizes that divide it decode each
    /// block about once.
    lanes: u64 = 8,
        Content(WithLanes), number(1, 1 << 20), [DataLoader];

    /// Keeps one sequence of each run of this many out of training. The seed does not change the
    /// choice.
    holdout: Option<u64> = None,
        Content(OrZero), Optional(number(2, 1 << 32)), [TokenDataset];

    /// Side of the holdout that is delivered.
    split: Split = Split::Train,
        Content(Always), Name, [TokenDataset];

    /// Positions that are never delivered. All others keep their numbers.
    skip: Vec<Skip> = Vec::new(),
        Content(ByProgress(&["skipped"], "only the ranges that have begun are compared")),
        Skips, [DataLoader];

    /// Continues a state of the first shards of this corpus. The new shards join at the next epoch.
    extend: bool = false,
        Content(ByProgress(&["shards", "growth"], "it says only whether a state of fewer shards is continued")),
        Switch, [DataLoader];

    /// Sequences per rank and step.
    batch_size: u64 = 1,
        Grouping, number(1, 1 << 32), [TorchParameter];

    /// Data-parallel rank. `none` takes it from the launcher, else 0.
    dp_rank: Option<u64> = None,
        Rank, Optional(number(0, (1 << 32) - 1).called("an integer below `dp_world_size`")), [DataLoader];

    /// Number of data-parallel ranks. `none` takes it from the launcher, else 1.
    dp_world_size: Option<u64> = None,
        Rank, Optional(number(1, 1 << 32)), [DataLoader];

    /// Neighbouring ranks of the launcher that read the same rows: tensor-, context- and
    /// pipeline-parallel peers.
    model_parallel_size: u64 = 1,
        Peers, number(1, 1 << 32), [DataLoader];

    /// Epochs of one pass. With more than one, batches run on across their borders.
    epochs: Epochs = Epochs::Count(1),
        Grouping, EpochCount, [DataLoader];

    /// Steps after which a pass ends, counted from the start of its first epoch.
    max_steps: Option<u64> = None,
        Grouping, Optional(number(1, 1 << 62).called("an integer from 1")), [DataLoader];

    /// Rule for the tokens and sequences at an epoch's end that fill no whole sequence or global
    /// batch.
    remainder: Remainder = Remainder::Drop,
        Grouping, Name, [DataLoader];

    /// Rule that moves rows between ranks. It needs ranks that can read each other's rows without
    /// decoding more.
    balance: Balance = Balance::Off,
        Grouping, Name, [DataLoader];

    /// Id that fills padded rows. Their labels are `ignore_index`.
    pad_id: u32 = 0,
        Grouping, token_id(), [DataLoader];

    /// In `pad`, a batch is as long as its longest row, rounded up to a multiple of this number.
    /// `none` makes all batches `seq_len` long.
    pad_to_multiple: Option<u64> = None,
        Grouping, Optional(number(1, 1 << 20)), [TokenDataset];

    /// Length of `cu_seqlens`: further values repeat the last one. `none` gives no further values.
    cu_seqlens_width: Option<u64> = None,
        Grouping, Optional(number(2, 1 << 31)), [TokenDataset];

    /// Adds `document_mask`, bool of shape `(batch_size, 1, seq_len, seq_len)`, to boundaries. It
    /// is true where a place may attend to a place: to itself, and to earlier places of its
    /// document.
    document_mask: bool = false,
        Grouping, Switch, [TokenDataset];

    /// Type of delivered input ids. Labels are always int64.
    input_dtype: Dtype = Dtype::I64,
        Grouping, IdDtype, [TokenDataset];

    /// Names, shapes and types of the arrays of a batch, as a trainer takes them. It decides
    /// `targets` if you do not set it. `none` gives the arrays that `targets` names.
    batch_format: Option<BatchFormat> = None,
        Grouping, Optional(Name), [DataLoader];

    /// Adds the place of each row to the batch: `source` and `sample_index`, int64 of shape
    /// `(batch_size,)`, -1 for padding.
    sample_ids: bool = false,
        Grouping, Switch, [DataLoader];

    /// Worker threads. With 0, the thread that asks for a batch computes it. `none` takes the CPUs
    /// of this rank less one, from 1 to 8.
    num_threads: Option<u64> = None,
        Operational, Optional(number(0, 1024)), [DataLoader];

    /// CPUs that worker threads may run on, as `0,2-5` or a list. Linux only. `none` allows all
    /// CPUs of the process.
    cpu_affinity: Option<Vec<u64>> = None,
        Operational, Optional(Cpus), [DataLoader];

    /// Number added to the `nice` value of worker threads, so that they take less from a trainer on
    /// the same CPUs. Linux only.
    thread_priority: u64 = 0,
        Operational, number(0, 19), [DataLoader];

    /// Batches computed ahead of the consumer.
    prefetch_batches: u64 = 4,
        Operational, number(1, 1 << 16), [DataLoader];

    /// Threads that run the function `transform` of a loader. `none` takes 1 where one thread at a
    /// time runs Python, and else `num_threads`.
    transform_threads: Option<u64> = None,
        Operational, Optional(number(1, 1024)), [DataLoader];

    /// Memory for decoded blocks and batches in flight.
    memory_budget: u64 = 512 << 20,
        Operational, bytes(), [TokenDataset, DataLoader];

    /// Approximate number of tokens in a block that is decoded at once. It never changes a batch.
    block_tokens: u64 = 128 << 10,
        Operational, tokens(1, 1 << 31, "128Ki"), [TokenDataset, DataLoader];

    /// Access to file bytes.
    io: Io = Io::Auto,
        Operational, Name, [TokenDataset, DataLoader];

    /// Rule for rows that cannot be read.
    on_error: OnError = OnError::Raise,
        Operational, Name, [DataLoader];

    /// Rows of this rank that a loader may replace, with `on_error` = substitute. The batch with
    /// one more such row is an error.
    max_substitutions: u64 = 100,
        Operational, number(0, 1 << 32), [DataLoader];

    /// Folder for the saved index of the corpus, which nodes may share. With it, shards are opened
    /// when they are first read. `none` takes `cache_dir`. Without both, all are opened at the
    /// start.
    index_dir: Option<String> = None,
        Operational, Optional(folder()), [TokenDataset, DataLoader];

    /// Folder on a local disk that keeps what was read from object stores. The processes of a node
    /// share it. Without `index_dir` it holds the saved index too.
    cache_dir: Option<String> = None,
        Operational, Optional(folder()), [TokenDataset, DataLoader];

    /// Limit of the bytes from object stores that `cache_dir` keeps.
    cache_bytes: u64 = 100 << 30,
        Operational, bytes(), [TokenDataset, DataLoader];

    /// URL of a server that speaks the protocol of the object store, such as MinIO. `none` takes
    /// it from the store's own variables and files, else the store's own server.
    storage_endpoint: Option<String> = None,
        Operational, Optional(text("a URL")), [TokenDataset, DataLoader];

    /// Region of the S3 buckets. `none` takes it from the standard variables and files.
    storage_region: Option<String> = None,
        Operational, Optional(text("a name")), [TokenDataset, DataLoader];

    /// Reads public buckets without credentials.
    storage_anonymous: bool = false,
        Operational, Switch, [TokenDataset, DataLoader];

    /// Seconds after which a request to an object store fails, all its tries included.
    storage_timeout: u64 = 120,
        Operational, number(1, 86_400), [TokenDataset, DataLoader];

    /// Limit of the requests that a process has in flight at an object store.
    storage_requests: u64 = 32,
        Operational, number(1, 4096), [TokenDataset, DataLoader];

    /// Addresses of a service that computes the batches in place of this process: `unix:PATH`,
    /// `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`. If a service does not answer, the loader takes
    /// the next address. Batches and states are the same as without a service.
    service: Vec<String> = Vec::new(),
        Operational, Addresses, [DataLoader];

    /// Seconds that a loader waits for a service before it fails. It tries all addresses meanwhile.
    service_timeout: u64 = 60,
        Operational, number(1, 86_400), [DataLoader];

    /// Computes batches in this process while no service answers. Needs local data, and `index_dir`
    /// or `cache_dir`. Takes a further `memory_budget` while it does so.
    service_fallback: bool = false,
        Operational, Switch, [DataLoader];

    /// Gives batches in page-locked memory. Only `forebay.torch.DataLoader` can do this.
    pin_memory: bool = false,
        Operational, Switch, [TorchParameter];

    /// Folder where every rank writes a line for each batch it hands over. `forebay verify` proves
    /// the run from it.
    delivery_log: Option<String> = None,
        Operational, Optional(folder()), [DataLoader];
}

#[cfg(test)]
mod tests {
    use crate::settings::{Config, Shuffle, all, find, nearest};

    /// A value other than the default for each setting, as text that reads back.
    const OTHER: &[(&str, &str)] = &[
        ("data", "a,b\\,c"),
        ("mixture", r#"{"sources": [{"name": "a", "data": "a", "weight": 1}]}"#),
        ("token_column", "text ids"),
        ("fields", "labels,loss mask"),
        ("skip", "10-20,3:0-5"),
        ("epochs", "endless"),
        ("cpu_affinity", "0,2-5"),
        ("memory_budget", "3GiB"),
        ("index_dir", "an index/here"),
        ("cache_dir", "a cache/here"),
        ("cache_bytes", "5GiB"),
        ("storage_endpoint", "http://localhost:9000"),
        ("storage_region", "eu-west-1"),
        ("service", "unix:/run/a\\,b,grpc://host:1"),
        ("delivery_log", "out/the delivery log"),
    ];

    /// The text of another value than the default, found by trying what settings accept.
    fn other(name: &str) -> String {
        if let Some((_, text)) = OTHER.iter().find(|(other, _)| *other == name) {
            return (*text).to_owned();
        }
        let setting = find(name).unwrap();
        let accepts = setting.accepts();
        let words = accepts.split('`').skip(1).step_by(2).map(str::to_owned);
        let candidates = words.chain(["16", "18"].map(str::to_owned));
        let mut config = Config::default();
        candidates
            .filter(|text| setting.set(&mut config, text.as_str()).is_ok() && setting.text(&config) == *text)
            .find(|text| *text != setting.default_text())
            .unwrap_or_else(|| panic!("no other value of `{name}` is known: add one to `OTHER`"))
    }

    #[test]
    fn a_setting_changes_its_field_alone_and_reads_back() {
        let texts = |config: &Config| all().iter().map(|setting| setting.text(config)).collect::<Vec<_>>();
        let before = texts(&Config::default());
        for setting in all() {
            let (name, text) = (setting.name, other(setting.name));
            let mut config = Config::default();
            setting.set(&mut config, text.as_str()).unwrap();
            assert_eq!(setting.text(&config), text, "{name}");
            let after = texts(&config);
            let changed: Vec<_> = (0..before.len()).filter(|at| before[*at] != after[*at]).collect();
            assert_eq!(changed.iter().map(|at| all()[*at].name).collect::<Vec<_>>(), [name]);
            let mut again = Config::default();
            setting.set(&mut again, setting.value(&config)).unwrap();
            assert_eq!(again, config, "the typed value of `{name}` reads back");
            if name != "data" {
                setting.set(&mut config, setting.default_text()).unwrap();
                assert_eq!(config, Config::default(), "{name}");
            }
        }
    }

    #[test]
    fn every_default_is_accepted() {
        let config = Config { data: vec!["corpus".to_owned()], ..Config::default() };
        config.validate().unwrap();
    }

    #[test]
    fn text_is_read_in_the_usual_ways() {
        let set = |name: &str, text: &str| {
            let mut config = Config::default();
            find(name).unwrap().set(&mut config, text).unwrap();
            config
        };
        assert_eq!(set("seed", "1_000_000").seed, 1_000_000);
        assert_eq!(set("seq_len", "4Ki").seq_len, 4096);
        assert_eq!(set("window_tokens", "2M").window_tokens, 2_000_000);
        for (text, bytes) in
            [("512MiB", 512 << 20), ("1GB", 1_000_000_000), ("1Mi", 1 << 20), ("2 gib", 2 << 30), ("77", 77)]
        {
            assert_eq!(set("memory_budget", text).memory_budget, bytes);
        }
        for (text, on) in
            [("1", true), ("TRUE", true), ("on", true), ("yes", true), ("0", false), ("off", false), ("no", false)]
        {
            assert_eq!(set("pin_memory", text).pin_memory, on);
            assert_eq!(set("shuffle", text).shuffle, if on { Shuffle::On } else { Shuffle::Off });
        }
        assert_eq!(set("ignore_index", "-9223372036854775808").ignore_index, i64::MIN);
        assert_eq!(set("ignore_index", " -1_000 ").ignore_index, -1000);
        assert_eq!(set("eos_id", " 0 ").eos_id, Some(0));
        assert_eq!(set("eos_id", "").eos_id, None);
        assert_eq!(set("data", "a/*.parquet,b").data, ["a/*.parquet", "b"]);
        assert_eq!(set("cpu_affinity", "7, 3-5,4").cpu_affinity, Some(vec![3, 4, 5, 7]));
        assert_eq!(set("data", r"a\b,c\\\,d").data, [r"a\b", r"c\,d"]);
    }

    #[test]
    fn bad_values_name_what_is_accepted() {
        for (name, text) in [
            ("data", ""),
            ("data", "a,,b"),
            ("format", "csv"),
            ("seq_len", "0"),
            ("seq_len", "2 KiB"),
            ("seq_len", "-1"),
            ("seq_len", "1__0"),
            ("targets", ""),
            ("ignore_index", "--1"),
            ("ignore_index", "-"),
            ("ignore_index", "9223372036854775808"),
            ("ignore_index", "-9223372036854775809"),
            ("bos_id", "2147483648"),
            ("pad_id", "none"),
            ("shuffle", "maybe"),
            ("seed", "18446744073709551616"),
            ("lanes", "none"),
            ("batch_size", "1e3"),
            ("dp_world_size", "0"),
            ("input_dtype", "uint16"),
            ("num_threads", "2000"),
            ("cpu_affinity", "3-1"),
            ("cpu_affinity", "0,,1"),
            ("cpu_affinity", "8192"),
            ("thread_priority", "20"),
            ("thread_priority", "-1"),
            ("memory_budget", "99999999Ti"),
            ("pin_memory", "2"),
            ("skip", "5"),
            ("skip", "9-3"),
            ("skip", "1:2:3-4"),
            ("epochs", "0"),
            ("epochs", "forever"),
            ("holdout", "1"),
            ("split", "validation"),
            ("model_parallel_size", "0"),
            ("max_steps", "0"),
        ] {
            let setting = find(name).unwrap();
            let mut config = Config::default();
            let error = setting.set_from(&mut config, &text.into(), "FROM_HERE").unwrap_err();
            assert_eq!(error.to_string(), format!("`FROM_HERE` must be {}, found `{text}`", setting.accepts()));
            assert_eq!(config, Config::default(), "a refused value changes nothing");
        }
    }

    #[test]
    fn the_nearest_name_is_found() {
        for (name, meant) in [
            ("seqlen", Some("seq_len")),
            ("SEQ_LEN", Some("seq_len")),
            ("threads", Some("num_threads")),
            ("prefetch", Some("prefetch_batches")),
            ("world_size", Some("dp_world_size")),
            ("batchsize", Some("batch_size")),
            ("learning_rate_decay", None),
        ] {
            assert_eq!(nearest(name), meant, "{name}");
        }
    }
}
