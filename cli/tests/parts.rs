//! Tests that parts of a command, run on any machines and in any order, do what one run does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use forebay::settings::environment::Environment;
use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, write};
use parquet::basic::Compression;
use serde_json::Value;

struct Ran {
    status: u8,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap()
    }
}

fn run(args: &[&str]) -> Ran {
    let args: Vec<OsString> = ["forebay"].iter().chain(args).map(OsString::from).collect();
    let env = Environment::from_pairs([("FOREBAY_PROGRESS", "0")]);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = forebay_cli::run(&args, &env, &mut out, &mut err);
    Ran { status, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

fn sound(args: &[&str]) -> Ran {
    let ran = run(args);
    assert_eq!(ran.status, 0, "{args:?}: {}", ran.err);
    ran
}

const SNAPPY: Container = Container::Parquet { codec: Compression::SNAPPY, encoding: None, pages: 1 };

fn shard(path: &Path, container: Container, dtype: Dtype, seed: u64) {
    write(path, container, dtype, Shape::List, &documents(20 + 7 * seed as usize, 30, 200, seed), 20);
}

/// A folder with a corpus of seven shards and an empty folder for each name of `others`.
fn corpus(container: Container, suffix: &str, others: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for name in others.iter().chain(&["corpus"]) {
        std::fs::create_dir(root.path().join(name)).unwrap();
    }
    for number in 0..7 {
        shard(&root.path().join(format!("corpus/{number}.{suffix}")), container, Dtype::I32, number);
    }
    root
}

/// The names and bytes of the files in `folder`.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

/// Texts of the paths of a corpus and of a folder for its index.
fn texts(root: &tempfile::TempDir, index: &str) -> (String, String) {
    let text = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    (text("corpus"), text(index))
}

#[test]
fn joined_parts_are_the_index_of_one_run() {
    let parts = ["1", "3", "7", "64"];
    for (container, suffix) in [(SNAPPY, "parquet"), (Container::ArrowFile(None), "arrow")] {
        let root = corpus(container, suffix, &[&["whole"][..], &parts].concat());
        for checksums in [&[][..], &["--checksums"]] {
            let index = |folder: &str, more: &[&str]| {
                let (data, folder) = texts(&root, folder);
                sound(&[&["index", &data, "--index-dir", &folder, "--json"], checksums, more].concat())
            };
            let mut expected = index("whole", &[]).json();
            let whole = files(&root.path().join("whole"));
            assert_eq!(whole.len(), 1 + checksums.len());
            for parts in parts {
                let count: u64 = parts.parse().unwrap();
                let (mut shards, mut tokens) = (0, 0);
                for number in (0..count).rev() {
                    let part = format!("{number}/{count}");
                    let found = index(parts, &["--part", &part]).json();
                    assert_eq!(found["part"], part);
                    shards += found["shards"].as_u64().unwrap();
                    tokens += found["tokens"].as_u64().unwrap();
                    // A second run finds all that the first one saved.
                    assert_eq!(index(parts, &["--part", &part]).json()["opened"], 0);
                }
                let mut joined = index(parts, &["--merge"]).json();
                assert_eq!((joined["opened"].clone(), shards), (0.into(), 7));
                for value in [&mut joined, &mut expected] {
                    for key in ["opened", "seconds", "index", "checksums"] {
                        value[key].take();
                    }
                }
                assert_eq!((&joined, tokens), (&expected, expected["tokens"].as_u64().unwrap()));
                assert_eq!(files(&root.path().join(parts)), whole, "{parts} parts, {suffix}");
                // A join that was killed before it removed the parts runs again.
                assert_eq!(index(parts, &["--merge"]).json()["opened"], 0);
            }
        }
    }
}

#[test]
fn parts_that_do_not_make_a_whole_are_refused_by_name() {
    let root = corpus(SNAPPY, "parquet", &["index"]);
    let (data, index) = texts(&root, "index");
    let part = |part: &str| sound(&["index", &data, "--index-dir", &index, "--part", part]);
    let refused = |words: &[&str]| {
        let ran = run(&["index", &data, "--index-dir", &index, "--merge"]);
        assert_eq!(ran.status, 1, "{}", ran.out);
        for word in words {
            assert!(ran.err.contains(word), "`{word}` in {}", ran.err);
        }
        let saved = files(Path::new(&index));
        assert!(!saved.keys().any(|name| name.ends_with(".forebay-index")), "{:?}", saved.keys());
    };
    let path_of = |part: &str| {
        let end = format!(".{}.forebay-part", part.replace('/', "-of-"));
        let name = files(Path::new(&index)).into_keys().find(|name| name.ends_with(&end)).unwrap();
        Path::new(&index).join(name)
    };
    refused(&["no part is saved here"]);
    part("1/3");
    refused(&["parts are missing", "0/3, 2/3"]);
    part("0/3");
    // Another number of parts beside it.
    part("0/2");
    refused(&["shared out twice", "0/2", "0/3"]);
    std::fs::remove_file(path_of("0/2")).unwrap();
    // A part under the name of another.
    let copy = path_of("0/3").to_str().unwrap().replace("0-of-3", "2-of-3");
    std::fs::copy(path_of("0/3"), &copy).unwrap();
    refused(&["2-of-3", "renamed or copied"]);
    part("2/3");
    // A part without its end.
    let bytes = std::fs::read(&copy).unwrap();
    std::fs::write(&copy, &bytes[..bytes.len() - 1]).unwrap();
    refused(&["2-of-3", "damaged"]);
    part("2/3");
    // Other data under the same name.
    shard(&Path::new(&data).join("4.parquet"), SNAPPY, Dtype::I32, 9);
    refused(&["run 1/3 again", "4.parquet"]);
    part("1/3");
    // A shard at the end changes one part, and a shard at the start changes all.
    shard(&Path::new(&data).join("7.parquet"), SNAPPY, Dtype::I32, 9);
    refused(&["run 1/3 again", "7.parquet"]);
    std::fs::remove_file(Path::new(&data).join("7.parquet")).unwrap();
    shard(&Path::new(&data).join("+.parquet"), SNAPPY, Dtype::I32, 9);
    refused(&["run 0/3, 1/3, 2/3 again"]);
    std::fs::remove_file(Path::new(&data).join("+.parquet")).unwrap();
    let checksums = run(&["index", &data, "--index-dir", &index, "--merge", "--checksums"]);
    assert!(checksums.status == 1 && checksums.err.contains("0/3, 1/3, 2/3"), "{}", checksums.err);
    sound(&["index", &data, "--index-dir", &index, "--merge"]);
}

#[test]
fn shards_of_several_types_are_refused_by_some_part() {
    for number in [0, 3, 6] {
        let root = corpus(SNAPPY, "parquet", &["index"]);
        let (data, index) = texts(&root, "index");
        shard(&root.path().join(format!("corpus/{number}.parquet")), SNAPPY, Dtype::I64, number);
        assert_eq!(run(&["check", &data]).status, 1);
        let statuses = [0, 1, 2].map(|part| run(&["check", &data, "--part", &format!("{part}/3")]).status);
        assert!(statuses.contains(&1), "shard {number}: {statuses:?}");
        for part in 0..7 {
            sound(&["index", &data, "--index-dir", &index, "--part", &format!("{part}/7")]);
        }
        let ran = run(&["index", &data, "--index-dir", &index, "--merge"]);
        assert!(ran.status == 1 && ran.err.contains("token types differ"), "{}", ran.err);
    }
}

#[test]
fn parts_of_a_check_find_what_one_check_finds() {
    for count in [1, 3, 64] {
        let root = corpus(SNAPPY, "parquet", &[]);
        let (data, _) = texts(&root, "corpus");
        let check = |part: Option<u64>| {
            let part = part.map(|number| format!("{number}/{count}"));
            let part: Vec<&str> = part.iter().flat_map(|part| ["--part", part]).collect();
            let ran = run(&[&["check", &data, "--json"], &part[..]].concat());
            (ran.status, ran.json())
        };
        let sums = |damaged: bool| {
            let (status, whole) = check(None);
            assert_eq!(status, u8::from(damaged));
            let parts: Vec<_> = (0..count).map(|number| check(Some(number))).collect();
            assert_eq!(parts.iter().filter(|(status, _)| *status == 1).count(), usize::from(damaged));
            for key in ["shards", "bytes", "rows", "documents", "tokens"] {
                let sum: u64 = parts.iter().map(|(_, found)| found[key].as_u64().unwrap()).sum();
                assert_eq!(sum, whole[key].as_u64().unwrap(), "{key} of {count} parts");
            }
            let broken: Vec<&Value> = parts.iter().flat_map(|(_, found)| found["broken"].as_array().unwrap()).collect();
            assert_eq!(broken, whole["broken"].as_array().unwrap().iter().collect::<Vec<_>>());
        };
        sums(false);
        std::fs::write(root.path().join("corpus/5.parquet"), b"PAR1").unwrap();
        sums(true);
    }
}

#[test]
fn a_wrong_part_is_a_wrong_command() {
    for command in ["index", "check", "rewrite"] {
        for part in ["3/3", "x", "1/0", "-1/3"] {
            let ran = run(&[command, "corpus", "target", &format!("--part={part}")]);
            assert!(ran.status == 2 && ran.err.contains("I from 0 to N - 1"), "{command} {part}: {}", ran.err);
        }
    }
    assert_eq!(run(&["index", "corpus", "--part", "0/3", "--merge"]).status, 2);
}

#[test]
fn parts_write_the_files_that_one_run_writes() {
    for (to, more) in [("arrow", &[][..]), ("parquet", &["--codec", "zstd"]), ("megatron", &[]), ("npy", &[])] {
        let root = corpus(SNAPPY, "parquet", &[]);
        let (data, _) = texts(&root, "corpus");
        let rewrite = |target: &str, last: &[&str]| {
            let target = texts(&root, target).1;
            let args = ["rewrite", &data, &target, "--to", to, "--dtype", "uint16", "--shard-tokens", "300", "--json"];
            run(&[&args, more, last].concat())
        };
        let done = |target: &str, last: &[&str]| {
            let ran = rewrite(target, last);
            assert_eq!(ran.status, 0, "{to} {last:?}: {}", ran.err);
            ran.json()
        };
        let whole = done("whole", &[]);
        for count in [1, 3, 64] {
            let target = format!("{to}-{count}");
            let part = |number: usize| format!("{number}/{count}");
            for number in (0..count).rev() {
                done(&target, &["--part", &part(number)]);
                // Nobody takes the result for a corpus before it is joined.
                let loaded = run(&["check", &texts(&root, &target).1]);
                assert!(loaded.status == 1 && loaded.err.contains("not complete"), "{}", loaded.err);
                let again = done(&target, &["--part", &part(number)]);
                assert_eq!(again["kept"], again["shards"]);
            }
            if to == "arrow" {
                let refused = rewrite(&target, &[]);
                assert!(refused.status == 2 && refused.err.contains("in parts"), "{}", refused.err);
                let refused = rewrite(&target, &["--part", &format!("0/{}", count + 1)]);
                assert!(refused.status == 2 && refused.err.contains(" parts, such as"), "{}", refused.err);
            }
            let joined = done(&target, &["--merge"]);
            for key in ["shards", "bytes", "rows", "documents", "tokens", "dtype"] {
                assert_eq!(joined[key], whole[key], "{key}");
            }
            // The lines of the manifest may stand in another order.
            let sorted = |target: &str| {
                let mut found = files(&root.path().join(target));
                let manifest = found.get_mut("_forebay_rewrite.jsonl").unwrap();
                let mut lines: Vec<String> =
                    String::from_utf8(manifest.clone()).unwrap().lines().map(str::to_owned).collect();
                lines.sort();
                *manifest = lines.join("\n").into_bytes();
                found
            };
            assert_eq!(sorted(&target), sorted("whole"), "{to} in {count} parts");
            done(&target, &["--merge"]);
            done(&target, &[]);
            sound(&["check", &texts(&root, &target).1]);
        }
    }
}

#[test]
fn parts_of_a_rewriting_that_do_not_make_a_whole_are_refused_by_name() {
    let root = corpus(SNAPPY, "parquet", &[]);
    let (data, target) = texts(&root, "target");
    let rewrite = |last: &[&str]| {
        let args = ["rewrite", &data, &target, "--shard-tokens", "300"];
        run(&[&args, last].concat())
    };
    let refused = |last: &[&str], status: u8, words: &[&str]| {
        let ran = rewrite(last);
        assert_eq!(ran.status, status, "{last:?}: {}{}", ran.out, ran.err);
        for word in words {
            assert!(ran.err.contains(word), "`{word}` in {}", ran.err);
        }
    };
    let typed = |last: &[&'static str]| [&["--dtype", "uint16"], last].concat();
    refused(&["--part", "0/3"], 2, &["--dtype uint16"]);
    refused(&typed(&["--merge"]), 1, &["no part is saved here"]);
    std::fs::remove_dir(&target).unwrap();
    assert_eq!(rewrite(&typed(&["--part", "1/3"])).status, 0);
    refused(&typed(&["--merge"]), 1, &["parts are missing", "0/3, 2/3"]);
    refused(&["--dtype", "int32", "--part", "0/3"], 1, &["`--dtype`", "uint16"]);
    for part in ["0/3", "2/3"] {
        assert_eq!(rewrite(&["--dtype", "uint16", "--part", part]).status, 0);
    }
    // A shard that is gone, a line that a kill cut off, and a draft that it left.
    let lost = files(Path::new(&target)).into_keys().find(|name| name.starts_with("tokens-00001")).unwrap();
    std::fs::remove_file(Path::new(&target).join(&lost)).unwrap();
    refused(&typed(&["--merge"]), 1, &["run 1/3 again", "tokens-00001"]);
    let manifest = Path::new(&target).join("_forebay_rewrite.1-of-3.jsonl");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, &text[..text.len() - 9]).unwrap();
    std::fs::write(Path::new(&target).join(format!(".part-{lost}")), b"half").unwrap();
    std::fs::write(Path::new(&target).join(".part-tokens-00000-000.arrow"), b"of another part").unwrap();
    assert_eq!(rewrite(&typed(&["--part", "1/3"])).status, 0);
    let names: Vec<String> = files(Path::new(&target)).into_keys().filter(|name| name.starts_with(".part")).collect();
    assert_eq!(names, [".part-tokens-00000-000.arrow"], "a part leaves the drafts of others alone");
    let foreign = Path::new(&target).join("notes.txt");
    std::fs::write(&foreign, b"mine").unwrap();
    refused(&typed(&["--merge"]), 2, &["notes.txt"]);
    std::fs::remove_file(&foreign).unwrap();
    assert_eq!(rewrite(&typed(&["--merge"])).status, 0);
    assert!(!files(Path::new(&target)).keys().any(|name| name.contains("part") || name.contains("-of-")));
}

#[test]
fn parts_of_a_proof_add_up_to_the_proof_of_one_run() {
    let families: &[&[&str]] = &[
        &["--shuffle"],
        &["--shuffle", "--set", "eos_id=7", "--set", "bos_id=9", "--set", "boundaries=true"],
        &["--shuffle", "--set", "targets=shifted", "--set", "remainder=pad"],
        &["--set", "layout=pack", "--shuffle", "--set", "remainder=pad"],
        &["--set", "layout=pack", "--set", "holdout=5", "--set", "eos_id=7"],
        &["--set", "layout=pad", "--set", "overflow=truncate"],
        &["--set", "holdout=3", "--epoch", "2", "--set", "remainder=wrap"],
        &["--set", "skip=3-20", "--set", "targets=shifted", "--set", "remainder=pad"],
    ];
    // Rows are longer than some shards, and shorter than others.
    for seq_len in ["16", "400"] {
        let root = corpus(SNAPPY, "parquet", &[]);
        let (data, _) = texts(&root, "corpus");
        // A shard without tokens, and a shard of one token.
        write(&root.path().join("corpus/3a.parquet"), SNAPPY, Dtype::I32, Shape::List, &[], 20);
        write(&root.path().join("corpus/3b.parquet"), SNAPPY, Dtype::I32, Shape::List, &[Some(vec![5])], 20);
        for (number, family) in families.iter().enumerate() {
            let args = [&["verify", &data, "--seq-len", seq_len, "--world-size", "4", "--json"], *family].concat();
            let whole = run(&args);
            assert_eq!(whole.status, 0, "{family:?}: {}{}", whole.out, whole.err);
            for count in [1, 3, 7, 64] {
                let proof = root.path().join(format!("{seq_len}-{number}-{count}"));
                let proof = ["--proof", proof.to_str().unwrap()];
                for part in 0..count {
                    sound(&[&args[..], &proof, &["--part", &format!("{part}/{count}")]].concat());
                }
                let joined = run(&[&args[..], &proof, &["--merge"]].concat());
                assert_eq!((joined.status, &joined.out), (0, &whole.out), "{family:?}, {count} parts: {}", joined.err);
            }
        }
    }
}

#[test]
fn parts_of_a_proof_that_do_not_make_a_whole_prove_nothing() {
    let root = corpus(SNAPPY, "parquet", &["proof"]);
    let (data, proof) = texts(&root, "proof");
    let args = ["verify", &data, "--seq-len", "16", "--shuffle", "--world-size", "4", "--proof", &proof];
    let verify = |last: &[&str]| run(&[&args[..], last].concat());
    let refused = |last: &[&str], words: &[&str]| {
        let ran = verify(&[&["--merge"], last].concat());
        assert_eq!(ran.status, 1, "{}{}", ran.out, ran.err);
        let said = ran.out + &ran.err;
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} in {said}");
    };
    let path = |part: &str| Path::new(&proof).join(format!("part-{part}.json"));
    refused(&[], &["no part is saved here"]);
    for part in ["0/3", "2/3"] {
        assert_eq!(verify(&["--part", part]).status, 0);
    }
    refused(&[], &["parts are missing", "run 1/3"]);
    std::fs::copy(path("0-of-3"), path("1-of-3")).unwrap();
    refused(&[], &["under the name of 1/3"]);
    std::fs::write(path("1-of-3"), "{\"part\": ").unwrap();
    refused(&[], &["part 1/3 is damaged"]);
    assert_eq!(verify(&["--part", "1/3"]).status, 0);
    assert_eq!(verify(&["--merge"]).status, 0);
    refused(&["--seed", "2"], &["proved something else", "seed"]);
    refused(&["--epoch", "1"], &["`epoch` is 0 there and 1 here"]);
    // A part that delivered the rows of another part.
    let text = std::fs::read_to_string(path("1-of-3")).unwrap();
    let other = std::fs::read_to_string(path("2-of-3")).unwrap();
    let found = |text: &str| serde_json::from_str::<Value>(text).unwrap()["found"].clone();
    let mut doubled: Value = serde_json::from_str(&text).unwrap();
    doubled["found"] = found(&other);
    std::fs::write(path("1-of-3"), doubled.to_string()).unwrap();
    refused(&[], &["NOT PROVEN"]);
    assert_eq!(verify(&["--part", "0/2"]).status, 0);
    refused(&[], &["shared out twice"]);
    assert_eq!(verify(&["--set", "phase=epoch", "--part", "0/3"]).status, 2);
}
