//! Tests that a saved index changes when shards are opened, and changes no batch.
//!
//! The loader never believes the index against a file.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use forebay::corpus::{Corpus, Indexed};
use forebay::format::OpenOptions;
use forebay::settings::{Config, DataFormat, Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{ErrorKind, Loader, Next};
use forebay_tests::{Container, Document, Shape, containers, documents, drain, rows, write};
use proptest::prelude::*;

/// A folder of shards, and one for the index.
struct Place {
    _root: tempfile::TempDir,
    data: PathBuf,
    cache: PathBuf,
    container: Container,
}

impl Place {
    fn new(container: Container, shards: usize) -> Self {
        let root = tempfile::tempdir().unwrap();
        let (data, cache) = (root.path().join("data"), root.path().join("cache"));
        std::fs::create_dir(&data).unwrap();
        let place = Self { _root: root, data, cache, container };
        for shard in 0..shards {
            place.write(shard, 20, shard as u64);
        }
        place
    }

    fn path(&self, shard: usize) -> PathBuf {
        let suffix = if matches!(self.container, Container::Parquet { .. }) { "parquet" } else { "arrow" };
        self.data.join(format!("{shard}.{suffix}"))
    }

    fn write(&self, shard: usize, count: usize, seed: u64) {
        let documents: Vec<Document> = if count == 0 { Vec::new() } else { documents(count, 9, 1000, seed) };
        write(&self.path(shard), self.container, Dtype::I32, Shape::List, &documents, 7);
    }

    fn config(&self, cached: bool) -> Config {
        Config {
            data: vec![self.data.to_str().unwrap().to_owned()],
            seq_len: 8,
            batch_size: 3,
            block_tokens: 20,
            num_threads: Some(2),
            remainder: Remainder::Pad,
            cache_dir: cached.then(|| self.cache.to_str().unwrap().to_owned()),
            ..Config::default()
        }
    }

    fn open(&self) -> Loader {
        Loader::open(self.config(true)).unwrap()
    }

    /// The only index there is.
    fn index(&self) -> PathBuf {
        let files: Vec<_> = std::fs::read_dir(&self.cache).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    /// Brings the index up to date, and says how many shards that opened.
    fn refresh(&self) -> u64 {
        let (corpus, Indexed { opened, unsaved, .. }) = index(&self.config(true), &self.cache).unwrap();
        assert!(unsaved.is_none() && corpus.warnings().is_empty(), "{:?}", corpus.warnings());
        assert!((0..corpus.len()).all(|shard| corpus.opened(shard).is_none()));
        opened
    }

    fn check_same(&self) {
        assert_eq!(contents(self.config(true)), contents(self.config(false)));
    }
}

fn index(config: &Config, cache: &Path) -> forebay::Result<(Corpus, Indexed)> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    Corpus::index(&config.data, DataFormat::Auto, &OpenOptions::of(config), cache, &pool, &|_, _| ())
}

/// Everything a loader says of an epoch.
fn contents(config: Config) -> (String, String, u64, u64, Vec<Vec<i64>>) {
    let name = if config.targets == Targets::Shifted { "x" } else { "input_ids" };
    let loader = Loader::open(config).unwrap();
    let (fingerprint, len, tokens) = (loader.corpus().fingerprint().to_owned(), loader.len(), loader.num_tokens());
    let batches = drain(&loader.iter());
    (fingerprint, format!("{:?}", loader.state()), len, tokens, rows(&batches, name))
}

fn first_error(loader: &Loader) -> forebay::Error {
    let batches = loader.iter();
    loop {
        match batches.next_timeout(Duration::from_secs(60)) {
            Ok(Next::Batch(_)) => {}
            Ok(other) => panic!("expected an error, found {other:?}"),
            Err(error) => return error,
        }
    }
}

fn set_modified(path: &Path, time: SystemTime) {
    std::fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
}

const ARROW: Container = Container::ArrowFile(None);

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn batches_fingerprint_and_state_are_those_without_an_index(
        container in prop::sample::select(containers()), counts in prop::collection::vec(0usize..25, 1..6),
        bos in prop::option::of(0u32..9), eos in prop::option::of(0u32..9), shuffle in prop::sample::select(vec![Shuffle::Off, Shuffle::Global, Shuffle::Block]),
        shifted: bool,
    ) {
        let place = Place::new(container, 0);
        for (shard, count) in counts.iter().enumerate() {
            place.write(shard, *count, shard as u64);
        }
        // Parquet without any row has no column to look at the documents of, but is a shard all the
        // same.
        let targets = if shifted { Targets::Shifted } else { Targets::Labels };
        let config = |cached| Config {
            bos_id: bos, eos_id: eos, shuffle, targets, chunk_tokens: 24, window_tokens: 64, lanes: 2, ..place.config(cached)
        };
        let expected = contents(config(false));
        // The first writes the index, the second uses it.
        prop_assert_eq!(&contents(config(true)), &expected);
        let written = std::fs::read(place.index()).unwrap();
        prop_assert_eq!(&contents(config(true)), &expected);
        prop_assert_eq!(std::fs::read(place.index()).unwrap(), written);
    }
}

#[test]
fn a_shard_is_opened_when_it_is_read() {
    let place = Place::new(ARROW, 5);
    place.refresh();
    let loader = place.open();
    let open = || (0..5).filter(|shard| loader.corpus().opened(*shard).is_some()).count();
    assert_eq!(open(), 0);
    loader.sequences_at(0, 0, 1).unwrap();
    assert_eq!(open(), 1);
    drain(&loader.iter());
    assert_eq!(open(), 5);
    assert!(loader.warnings().is_empty());
}

#[test]
fn only_what_changed_is_opened_anew() {
    let place = Place::new(ARROW, 6);
    assert_eq!(place.refresh(), 6);
    assert_eq!(place.refresh(), 0);
    place.write(6, 10, 6);
    assert_eq!(place.refresh(), 1, "a new shard");
    place.check_same();
    place.write(2, 30, 2);
    assert_eq!(place.refresh(), 1, "a shard that grew");
    place.check_same();
    set_modified(&place.path(3), SystemTime::UNIX_EPOCH + Duration::from_secs(12));
    assert_eq!(place.refresh(), 1, "a touched shard");
    place.check_same();
    place.write(9, 20, 9);
    std::fs::rename(place.path(9), place.path(4)).unwrap();
    assert_eq!(place.refresh(), 1, "a shard in the place of another");
    place.check_same();
    std::fs::remove_file(place.path(0)).unwrap();
    assert_eq!(place.refresh(), 0, "a shard less, and the others in new places");
    assert_eq!(place.refresh(), 0);
    place.check_same();
}

#[test]
fn a_prefix_of_the_shards_has_the_fingerprint_of_a_corpus_of_these_alone() {
    let place = Place::new(ARROW, 4);
    let grown = place.open();
    for shards in (0..4).rev() {
        std::fs::remove_file(place.path(shards)).unwrap();
        if shards > 0 {
            assert_eq!(grown.corpus().fingerprint_of(shards), place.open().corpus().fingerprint());
        }
    }
    assert_ne!(grown.corpus().fingerprint_of(3), grown.corpus().fingerprint());
}

#[test]
fn a_damaged_index_is_made_anew_with_a_warning() {
    let place = Place::new(ARROW, 2);
    let expected = contents(place.config(false));
    place.refresh();
    let (path, sound) = (place.index(), std::fs::read(place.index()).unwrap());
    for at in 0..=sound.len() {
        let mut bytes = sound.clone();
        match bytes.get_mut(at) {
            Some(byte) => *byte ^= 0x10,
            None => bytes.truncate(at / 2),
        }
        std::fs::write(&path, bytes).unwrap();
        let loader = place.open();
        assert!(loader.warnings()[0].contains("saved index is damaged"), "{:?}", loader.warnings());
        assert_eq!(loader.corpus().fingerprint(), expected.0);
        assert_eq!(std::fs::read(&path).unwrap(), sound, "byte {at}");
    }
    assert_eq!(contents(place.config(true)), expected);
}

#[test]
fn an_index_that_cannot_be_saved_is_a_warning() {
    let place = Place::new(ARROW, 3);
    // No user can make a folder in the place of a file.
    std::fs::write(&place.cache, "a file").unwrap();
    let loader = place.open();
    assert!(loader.warnings()[0].contains("cannot write saved index"), "{:?}", loader.warnings());
    place.check_same();
}

#[test]
fn a_shard_that_is_gone_or_changed_fails_at_its_first_read_by_name() {
    for (what, kind) in [("gone", ErrorKind::NotFound), ("grown", ErrorKind::Changed), ("touched", ErrorKind::Changed)]
    {
        let place = Place::new(ARROW, 4);
        place.refresh();
        let loader = place.open();
        let path = place.path(2);
        match what {
            "gone" => std::fs::remove_file(&path).unwrap(),
            "grown" => place.write(2, 40, 2),
            _ => set_modified(&path, SystemTime::UNIX_EPOCH),
        }
        let error = first_error(&loader);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(loader.sequences_at(0, 0, 1).is_ok(), "other shards can still be read");
    }
}

#[test]
fn other_content_of_the_same_size_and_time_is_noticed_when_it_is_opened() {
    let place = Place::new(ARROW, 1);
    let document = |ids: &[i64]| Some(ids.to_vec());
    let put = |documents: &[Document]| write(&place.path(0), ARROW, Dtype::I32, Shape::List, documents, 100);
    put(&[document(&[1, 2, 3]), document(&[4, 5, 6, 7, 8, 9, 10, 11, 12])]);
    let metadata = std::fs::metadata(place.path(0)).unwrap();
    place.refresh();
    put(&[document(&[1, 2, 3]), document(&[4, 5, 6, 7, 8, 9, 10, 11])]);
    assert_eq!(std::fs::metadata(place.path(0)).unwrap().len(), metadata.len(), "buffers are padded");
    set_modified(&place.path(0), metadata.modified().unwrap());
    let error = first_error(&place.open());
    assert_eq!(error.kind(), ErrorKind::Changed);
    assert!(error.to_string().contains("expected 2 rows and 12 int32 tokens"), "{error}");
}

#[test]
fn a_fault_is_reported_with_all_others_while_the_index_is_made() {
    let place = Place::new(ARROW, 4);
    for shard in [1, 3] {
        std::fs::write(place.path(shard), "no shard at all").unwrap();
    }
    let error = Loader::open(place.config(true)).unwrap_err().to_string();
    assert!(error.contains("1.arrow") && error.contains("3.arrow"), "{error}");
}

#[test]
fn shards_that_do_not_fit_together_are_refused_from_the_index_too() {
    let place = Place::new(ARROW, 2);
    write(&place.path(2), ARROW, Dtype::U16, Shape::List, &documents(5, 9, 1000, 1), 7);
    for _ in 0..2 {
        let error = Loader::open(place.config(true)).unwrap_err().to_string();
        assert!(error.contains("token types differ"), "{error}");
    }
}

#[test]
fn loaders_that_start_at_once_do_each_other_no_harm() {
    let place = Place::new(ARROW, 8);
    let expected = contents(place.config(false));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(contents(place.config(true)), expected));
        }
    });
    assert_eq!(place.refresh(), 0);
    place.index();
}
