//! Layouts that keep documents whole, against the specification in plain Python.
//!
//! `tests/golden/layouts.json` holds the results of `tests/python/reference_layout.py`. The laws
//! below hold for any lengths and settings.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use forebay::format::Counts;
use forebay::layout::{DocumentSide, Documents, Layout, LayoutSettings, Segment, Specials, Stream, WindowPlan};
use forebay::order::permutation::derive_key;
use forebay::settings::{LayoutKind as Kind, Overflow};
use proptest::prelude::*;
use serde_json::Value;

/// A layout over documents of some lengths, and the data for its plans.
struct Corpus {
    lengths: Vec<Arc<[u32]>>,
    stream: Arc<Stream>,
    layout: Box<dyn Layout>,
    specials: u64,
}

impl Corpus {
    fn new(lengths: &[Vec<u32>], specials: u64, settings: &LayoutSettings) -> Self {
        let counts = |lengths: &Vec<u32>| {
            let documents = lengths.len() as u64;
            Counts { tokens: lengths.iter().map(|length| u64::from(*length)).sum(), starts: documents, ends: documents }
        };
        let ids = Specials { bos: (specials > 1).then_some(1), eos: (specials > 0).then_some(2) };
        let stream = Arc::new(Stream::new(lengths.iter().map(counts), ids));
        let lengths: Vec<Arc<[u32]>> = lengths.iter().map(|lengths| lengths.clone().into()).collect();
        let layout = forebay::layout::build(settings, &stream, &|shard| Ok(Arc::clone(&lengths[shard]))).unwrap();
        Self { lengths, stream, layout, specials }
    }

    /// Row `row` of the first `shards` shards.
    fn row(&self, shards: usize, row: u64) -> Vec<Segment> {
        let (window, row) = self.layout.locate(&self.layout.extent(shards), row);
        let mut plan = WindowPlan::default();
        let documents = window.documents.clone();
        let lengths = documents.map(|(shard, range)| &self.lengths[shard][range.start as usize..range.end as usize]);
        self.layout.plan(&window, lengths.unwrap_or_default(), &mut plan);
        plan.row(row).to_vec()
    }

    /// All rows of the first `shards` shards. Plans each window once.
    fn rows(&self, shards: usize) -> Vec<Vec<Segment>> {
        let extent = self.layout.extent(shards);
        let (mut rows, mut plan, mut planned) = (Vec::new(), WindowPlan::default(), None);
        for row in 0..extent.rows {
            let (window, row) = self.layout.locate(&extent, row);
            if planned != Some(window.number) {
                plan.clear();
                let documents = window.documents.clone();
                let lengths =
                    documents.map(|(shard, range)| &self.lengths[shard][range.start as usize..range.end as usize]);
                self.layout.plan(&window, lengths.unwrap_or_default(), &mut plan);
                planned = Some(window.number);
            }
            rows.push(plan.row(row).to_vec());
        }
        rows
    }

    /// A segment as the specification writes it: shard, document, offset in the document, length,
    /// place.
    fn described(&self, segment: &Segment) -> [u64; 5] {
        let (shard, within) = self.stream.locate(segment.start);
        let Documents::One { number, ends } = segment.documents else { panic!("a segment of one document") };
        let lengths = &self.lengths[shard];
        let start: u64 = lengths[..number as usize].iter().map(|length| u64::from(*length) + self.specials).sum();
        let offset = within - start;
        assert_eq!(ends, offset + segment.len == u64::from(lengths[number as usize]) + self.specials);
        [shard as u64, number, offset, segment.len, segment.place]
    }
}

fn settings(kind: Kind, seq_len: u64, shifted: bool) -> LayoutSettings {
    LayoutSettings {
        kind,
        seq_len,
        row_tokens: seq_len + u64::from(shifted),
        overflow: Overflow::Split,
        max_docs_per_row: None,
        pack_align: 1,
        side: DocumentSide::All,
    }
}

#[test]
fn rows_are_those_of_the_specification() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/layouts.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let given = &case["settings"];
        let number = |name: &str| given[name].as_u64();
        let specials = number("specials").unwrap_or(0);
        let kind = match given["layout"].as_str().unwrap() {
            "pack" => Kind::Pack,
            "pad" => Kind::Pad,
            _ => Kind::Rows,
        };
        let mut settings = settings(kind, number("seq_len").unwrap(), given["targets"] == "shifted");
        settings.overflow = match given["overflow"].as_str() {
            Some("truncate") => Overflow::Truncate,
            Some("drop") => Overflow::Drop,
            _ => Overflow::Split,
        };
        settings.max_docs_per_row = number("max_docs_per_row").map(|most| most as u32);
        settings.pack_align = number("pack_align").unwrap_or(1) as u32;
        settings.side = match number("holdout") {
            None => DocumentSide::All,
            Some(every) if given["split"] == "holdout" => DocumentSide::Holdout(every),
            Some(every) => DocumentSide::Train(every),
        };
        let corpus = &golden["corpora"][case["corpus"].as_str().unwrap()];
        let (seed, mut drawn) = (corpus["seed"].as_u64().unwrap(), 0);
        let lengths = corpus["documents"].as_array().unwrap().iter().map(|documents| {
            let documents = 0..documents.as_u64().unwrap();
            let length = |_| {
                let draw = derive_key(seed, &[drawn]);
                drawn += 1;
                let longest = corpus["longest"][(draw % 4) as usize].as_u64().unwrap();
                let fixed = corpus["fixed"].as_u64();
                fixed.unwrap_or_else(|| 1 + (draw >> 32) % longest) as u32
            };
            documents.map(length).collect()
        });
        let lengths: Vec<Vec<u32>> = lengths.collect();
        let corpus = Corpus::new(&lengths, specials, &settings);
        let rows: Vec<Vec<[u64; 5]>> = corpus
            .rows(lengths.len())
            .iter()
            .map(|row| row.iter().map(|segment| corpus.described(segment)).collect())
            .collect();
        assert_eq!(rows.len() as u64, case["rows"].as_u64().unwrap(), "{case}");
        assert_eq!(serde_json::json!(rows[..rows.len().min(2)]), case["first"], "{given}");
        let digest = rows.iter().fold(0, |key, row| {
            let key = derive_key(key, &[row.len() as u64]);
            row.iter().fold(key, |key, segment| derive_key(key, segment))
        });
        assert_eq!(digest, case["digest"].as_u64().unwrap(), "{given}");
    }
}

fn overflows() -> impl Strategy<Value = Overflow> {
    prop::sample::select(vec![Overflow::Split, Overflow::Truncate, Overflow::Drop])
}

fn shards() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(prop_oneof![1u32..50, 1u32..400], 0..120), 1..4)
}

proptest! {
    #[test]
    fn every_token_that_is_not_lost_stands_in_one_row(
        lengths in shards(), half_len in 8u64..60, shifted: bool, specials in 0u64..3, overflow in overflows(),
        pack: bool, most in prop::option::of(1u32..5), align in prop::sample::select(vec![1u32, 2]),
    ) {
        let mut settings = settings(if pack { Kind::Pack } else { Kind::Pad }, half_len * 2, shifted);
        (settings.overflow, settings.max_docs_per_row, settings.pack_align) = (overflow, most, align);
        let corpus = Corpus::new(&lengths, specials, &settings);
        let lost = corpus.layout.lost(lengths.len());
        let mut seen = vec![0u8; corpus.stream.len() as usize];
        for row in corpus.rows(lengths.len()) {
            prop_assert!(!row.is_empty());
            let most = if pack { most.unwrap_or(u32::MAX) as usize } else { 1 };
            prop_assert!(row.len() <= most);
            let mut free = 0;
            for segment in &row {
                prop_assert!(segment.place >= free);
                prop_assert!(!pack || segment.place.is_multiple_of(u64::from(align)));
                // Its first token is an input.
                prop_assert!(segment.place < settings.seq_len);
                free = segment.place + segment.len;
                segment.stream().for_each(|at| seen[at as usize] += 1);
            }
            prop_assert!(free <= settings.row_tokens);
        }
        let held = seen.iter().filter(|count| **count == 1).count() as u64;
        prop_assert!(seen.iter().all(|count| *count <= 1));
        prop_assert_eq!(held + lost.truncated_tokens + lost.dropped_tokens, corpus.stream.len());
        prop_assert!(overflow != Overflow::Split || lost == forebay::layout::Lost::default());
    }

    #[test]
    fn the_first_shards_are_laid_out_as_if_they_were_all(
        lengths in shards(), overflow in overflows(), every in prop::option::of(2u64..5),
    ) {
        let mut settings = settings(Kind::Pack, 64, false);
        settings.overflow = overflow;
        settings.side = every.map_or(DocumentSide::All, DocumentSide::Train);
        let grown = Corpus::new(&lengths, 1, &settings);
        for shards in 0..lengths.len() {
            let alone = Corpus::new(&lengths[..shards], 1, &settings);
            prop_assert_eq!(grown.rows(shards), alone.rows(shards));
            prop_assert_eq!(grown.layout.lost(shards), alone.layout.lost(shards));
            prop_assert_eq!(grown.layout.extent(shards), alone.layout.extent(shards));
        }
    }

    #[test]
    fn the_sides_of_a_holdout_share_the_documents(lengths in shards(), every in 2u64..6, pack: bool) {
        let whole = settings(if pack { Kind::Pack } else { Kind::Pad }, 64, false);
        let documents = |side| {
            let corpus = Corpus::new(&lengths, 0, &LayoutSettings { side, ..whole });
            let rows = corpus.rows(lengths.len()).concat();
            let mut documents: Vec<_> = rows.iter().map(|segment| corpus.described(segment)[..2].to_vec()).collect();
            documents.sort_unstable();
            documents.dedup();
            documents
        };
        let (train, held) = (documents(DocumentSide::Train(every)), documents(DocumentSide::Holdout(every)));
        let mut both = [train, held].concat();
        both.sort_unstable();
        prop_assert_eq!(both, documents(DocumentSide::All));
    }

    #[test]
    fn a_row_is_found_without_the_others(lengths in shards(), seq_len in 2u64..100) {
        let corpus = Corpus::new(&lengths, 1, &settings(Kind::Pack, seq_len, true));
        let rows = corpus.rows(lengths.len());
        for row in [0, rows.len() / 2, rows.len().saturating_sub(1)].into_iter().filter(|row| *row < rows.len()) {
            prop_assert_eq!(&corpus.row(lengths.len(), row as u64), &rows[row]);
        }
    }
}

#[test]
fn rows_of_another_length_are_refused() {
    let settings = settings(Kind::Rows, 8, false);
    let counts = [Counts { tokens: 16, starts: 2, ends: 2 }];
    let stream = Arc::new(Stream::new(counts.into_iter(), Specials::default()));
    let error = forebay::layout::build(&settings, &stream, &|_| Ok([9, 7].into())).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("exactly 8 tokens") && text.contains("has 9"), "{text}");
}
