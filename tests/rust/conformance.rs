//! Tests that every container, codec, encoding, type and shape of arrow-rs gives its documents.

use forebay::format::DecodedPages;
use forebay::settings::{Config, Io, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{ErrorKind, Loader};
use forebay_tests::{Container, Document, Shape, containers, documents, drain, rows, stream, write};
use parquet::basic::Encoding;

const DTYPES: [Dtype; 7] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I8, Dtype::I16, Dtype::I32, Dtype::I64];

fn vocabulary(dtype: Dtype) -> i64 {
    match dtype {
        Dtype::I8 => 1 << 7,
        Dtype::U8 => 1 << 8,
        Dtype::I16 => 1 << 15,
        Dtype::U16 => 1 << 16,
        _ => 1 << 31,
    }
}

fn fits(container: Container, dtype: Dtype) -> bool {
    // Arrow-rs refuses byte stream split for types that Parquet stores wider than they are.
    !matches!(container, Container::Parquet { encoding: Some(Encoding::BYTE_STREAM_SPLIT), .. }) || dtype.size() >= 4
}

fn check(container: Container, dtype: Dtype, shape: Shape, shards: &[Vec<Document>], config: &Config) {
    let folder = tempfile::tempdir().unwrap();
    for (index, documents) in shards.iter().enumerate() {
        let suffix = if matches!(container, Container::Parquet { .. }) { "parquet" } else { "arrow" };
        write(&folder.path().join(format!("{index:03}.{suffix}")), container, dtype, shape, documents, 37);
    }
    let config = Config { data: vec![folder.path().to_str().unwrap().to_owned()], ..config.clone() };
    let what = format!("{container:?} {dtype:?} {shape:?} {config:?}");
    let loader = Loader::open(config.clone()).unwrap_or_else(|error| panic!("{what}: {}", error.report()));
    let expected = stream(shards, config.bos_id, config.eos_id);
    assert_eq!(loader.num_tokens(), expected.len() as u64, "{what}");
    let seq_len = config.seq_len as usize;
    let batches = drain(&loader.iter());
    if config.targets == Targets::Shifted {
        let wanted = expected.windows(seq_len + 1).step_by(seq_len);
        let (x, y) = (rows(&batches, "x"), rows(&batches, "y"));
        assert!(x.iter().map(Vec::as_slice).eq(wanted.clone().map(|row| &row[..seq_len])), "{what}");
        assert!(y.iter().map(Vec::as_slice).eq(wanted.map(|row| &row[1..])), "{what}");
    } else {
        let wanted = expected.chunks_exact(seq_len);
        for name in ["input_ids", "labels"] {
            let rows = rows(&batches, name);
            assert!(rows.iter().map(Vec::as_slice).eq(wanted.clone()), "{what} {name}");
        }
    }
    check_decoder(container, loader.stats().decoded_pages, &what);
}

/// All pages were taken by the decoder of their encoding, and no row group was left to arrow-rs.
fn check_decoder(container: Container, found: DecodedPages, what: &str) {
    let of_encoding = match container {
        Container::Parquet { encoding: None, .. } => {
            DecodedPages { dictionary: found.dictionary, ..Default::default() }
        }
        Container::Parquet { encoding: Some(Encoding::PLAIN), .. } => {
            DecodedPages { plain: found.plain, ..Default::default() }
        }
        Container::Parquet { encoding: Some(Encoding::DELTA_BINARY_PACKED), .. } => {
            DecodedPages { delta: found.delta, ..Default::default() }
        }
        Container::Parquet { encoding: Some(Encoding::BYTE_STREAM_SPLIT), .. } => {
            DecodedPages { byte_stream_split: found.byte_stream_split, ..Default::default() }
        }
        Container::Parquet { encoding: Some(other), .. } => panic!("{other} is not looked at"),
        Container::ArrowFile(_) | Container::ArrowStream(_) => DecodedPages::default(),
    };
    assert_eq!(found, of_encoding, "{what}");
    assert_eq!(matches!(container, Container::Parquet { .. }), found != DecodedPages::default(), "{what}");
}

/// A row of the matrix that the Python tests print, for what was covered here.
fn covered(container: Container, dtype: Dtype) -> serde_json::Value {
    let codec = |codec: Option<arrow_ipc::CompressionType>| match codec {
        None => "none".to_owned(),
        Some(codec) => codec.variant_name().unwrap_or("?").to_lowercase(),
    };
    let (format, codec, encoding) = match container {
        Container::ArrowFile(c) => ("arrow file".to_owned(), codec(c), "-".to_owned()),
        Container::ArrowStream(c) => ("arrow stream".to_owned(), codec(c), "-".to_owned()),
        Container::Parquet { codec, encoding, pages } => (
            format!("parquet, pages v{pages}"),
            codec.to_string().split('(').next().unwrap_or_default().to_lowercase().replace("uncompressed", "none"),
            encoding.map_or("dictionary".to_owned(), |encoding| encoding.to_string().to_lowercase()),
        ),
    };
    serde_json::json!({
        "writer": "arrow-rs", "format": format, "codec": codec, "encoding": encoding,
        "type": format!("list<{}>", dtype.name()), "note": "",
    })
}

#[test]
fn every_container_and_type_gives_what_was_written() {
    let mut matrix = Vec::new();
    for container in containers() {
        for dtype in DTYPES {
            if !fits(container, dtype) {
                continue;
            }
            let shards = [documents(90, 40, vocabulary(dtype), 1), Vec::new(), documents(50, 40, vocabulary(dtype), 2)];
            for (index, (bos_id, eos_id)) in [(None, None), (Some(1), Some(2)), (None, Some(0))].into_iter().enumerate()
            {
                let config = Config {
                    seq_len: 16,
                    bos_id,
                    eos_id,
                    block_tokens: [1, 200, 1 << 20][index],
                    io: if index == 1 { Io::Pread } else { Io::Mmap },
                    targets: if index == 2 { Targets::Shifted } else { Targets::Labels },
                    ..Config::default()
                };
                check(container, dtype, Shape::List, &shards, &config);
            }
            matrix.push(covered(container, dtype));
        }
    }
    let out = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../out");
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(out.join("conformance-arrow-rs.json"), serde_json::to_vec(&matrix).unwrap()).unwrap();
}

#[test]
fn large_and_fixed_size_lists_give_what_was_written() {
    for container in containers() {
        let config = Config { seq_len: 16, eos_id: Some(7), block_tokens: 300, ..Config::default() };
        let shards = [documents(90, 40, 1 << 31, 1), documents(50, 40, 1 << 31, 2)];
        check(container, Dtype::I32, Shape::LargeList, &shards, &config);
        let fixed: Vec<Document> =
            (0..100).map(|row| (row % 9 != 4).then(|| (row * 12..row * 12 + 12).collect())).collect();
        check(container, Dtype::I32, Shape::FixedSizeList(12), &[fixed], &config);
    }
}

#[test]
fn all_formats_give_the_same_batches_for_the_same_explicit_shuffle() {
    let shards = [documents(400, 60, 1 << 31, 3), documents(300, 60, 1 << 31, 4)];
    for shuffle in [Shuffle::Off, Shuffle::Global, Shuffle::Block] {
        let mut first = None;
        for container in [
            Container::ArrowFile(None),
            Container::ArrowStream(Some(arrow_ipc::CompressionType::ZSTD)),
            Container::Parquet { codec: parquet::basic::Compression::SNAPPY, encoding: None, pages: 1 },
        ] {
            let folder = tempfile::tempdir().unwrap();
            for (index, documents) in shards.iter().enumerate() {
                let suffix = if matches!(container, Container::Parquet { .. }) { "parquet" } else { "arrow" };
                let path = folder.path().join(format!("{index}.{suffix}"));
                write(&path, container, Dtype::I32, Shape::List, documents, 29);
            }
            let loader = Loader::open(Config {
                data: vec![folder.path().to_str().unwrap().to_owned()],
                seq_len: 32,
                batch_size: 4,
                shuffle,
                seed: 5,
                chunk_tokens: 320,
                window_tokens: 2000,
                block_tokens: 100,
                num_threads: Some(3),
                ..Config::default()
            })
            .unwrap();
            let got = rows(&drain(&loader.iter()), "input_ids");
            assert_eq!(got.len() as u64, loader.len() * 4);
            assert_eq!(first.get_or_insert_with(|| got.clone()), &got, "{shuffle:?} {container:?}");
        }
    }
}

#[test]
fn a_column_that_holds_no_tokens_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write(&path, containers()[6], Dtype::I32, Shape::List, &documents(5, 5, 100, 1), 10);
    for (column, words) in [("text", "text"), ("nothing", "`text`, `input_ids`")] {
        let error = Loader::open(Config {
            data: vec![path.to_str().unwrap().to_owned()],
            token_column: Some(column.to_owned()),
            ..Config::default()
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data, "{error}");
        assert!(error.report().contains(words), "{error}");
        assert!(error.report().contains("a.parquet"), "{error}");
    }
}
