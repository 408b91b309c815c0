use super::*;

fn names(data: &[&Path], format: DataFormat) -> Result<Vec<String>> {
    let data: Vec<String> = data.iter().map(|path| path.to_str().unwrap().to_owned()).collect();
    Ok(find(&Files::local(), &data, format)?.shards.into_iter().map(|shard| shard.name).collect())
}

fn touch(root: &Path, names: &[&str]) {
    for name in names {
        std::fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        std::fs::write(root.join(name), b"x").unwrap();
    }
}

#[test]
fn folders_are_searched_bytewise_without_hidden_files() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(
        root,
        &["b/1.parquet", "a.parquet", "B.parquet", "b.parquet", "_x/1.parquet", ".y.parquet", "n.txt", "z.arrow"],
    );
    assert_eq!(
        names(&[root], DataFormat::Auto).unwrap(),
        ["B.parquet", "a.parquet", "b.parquet", "b/1.parquet", "z.arrow"]
    );
    assert_eq!(names(&[root], DataFormat::Arrow).unwrap(), ["z.arrow"]);
    assert_eq!(names(&[&root.join("*.parquet")], DataFormat::Auto).unwrap(), ["B.parquet", "a.parquet", "b.parquet"]);
    assert_eq!(names(&[&root.join("**/1.parquet")], DataFormat::Auto).unwrap(), ["b/1.parquet"]);
    assert_eq!(names(&[&root.join("_x/*.parquet")], DataFormat::Auto).unwrap(), ["1.parquet"]);
    assert_eq!(names(&[&root.join(".*.parquet")], DataFormat::Auto).unwrap(), [".y.parquet"]);
    assert_eq!(
        names(&[&root.join("b.parquet"), &root.join("a.parquet")], DataFormat::Auto).unwrap(),
        ["b.parquet", "a.parquet"],
        "a list keeps its order"
    );
}

#[test]
fn a_loop_of_links_ends() {
    let root = tempfile::tempdir().unwrap();
    touch(root.path(), &["a/1.parquet"]);
    #[cfg(unix)]
    std::os::unix::fs::symlink(root.path(), root.path().join("a/again")).unwrap();
    assert_eq!(names(&[root.path()], DataFormat::Auto).unwrap(), ["a/1.parquet"]);
}

#[test]
fn what_is_not_there_is_named() {
    let root = tempfile::tempdir().unwrap();
    touch(root.path(), &["n.txt"]);
    for (path, words) in [
        (root.path().to_owned(), "found 1 other file;"),
        (root.path().join("none"), "no such file"),
        (root.path().join("*.parquet"), "matches no file"),
    ] {
        let error = names(&[&path], DataFormat::Auto).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.report().contains(words), "{error}");
        assert!(error.report().contains(root.path().to_str().unwrap()), "{error}");
    }
    let twice = root.path().join("n.txt");
    assert!(names(&[&twice, &twice], DataFormat::Auto).unwrap_err().to_string().contains("listed twice"));
}

#[test]
fn saved_datasets_are_read_in_the_order_of_their_state() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["d/b.arrow", "d/a.arrow", "d/stray.arrow", "s/dataset_dict.json", "s/train/x", "s/test/x"]);
    std::fs::write(root.join("d/state.json"), r#"{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}"#)
        .unwrap();
    assert_eq!(names(&[&root.join("d")], DataFormat::Auto).unwrap(), ["b.arrow", "a.arrow"]);
    let error = names(&[&root.join("s")], DataFormat::Auto).unwrap_err();
    assert!(error.to_string().contains("`test`, `train`"), "{error}");
    std::fs::write(root.join("d/state.json"), r#"{"_data_files": [{"filename": "c.arrow"}]}"#).unwrap();
    assert_eq!(names(&[&root.join("d")], DataFormat::Auto).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn saved_datasets_inside_folders_keep_their_order_and_leave_caches_out() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["c.arrow", "d/b.arrow", "d/a.arrow", "d/cache-1234.arrow", "d-e.arrow", "d0.arrow"]);
    let state = r#"{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}"#;
    std::fs::write(root.join("d/state.json"), state).unwrap();
    assert_eq!(
        names(&[root], DataFormat::Auto).unwrap(),
        ["c.arrow", "d-e.arrow", "d/b.arrow", "d/a.arrow", "d0.arrow"]
    );
    touch(root, &["s/dataset_dict.json", "s/train/x.arrow", "s/test/x.arrow"]);
    let error = names(&[root], DataFormat::Auto).unwrap_err();
    assert!(error.to_string().contains("`test`, `train`"), "{error}");
}

#[cfg(unix)]
#[test]
fn names_that_a_hub_links_to_one_file_are_several_shards() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["blobs/0123", "snapshot/x"]);
    for name in ["1.parquet", "2.parquet"] {
        std::os::unix::fs::symlink(root.join("blobs/0123"), root.join("snapshot").join(name)).unwrap();
    }
    std::os::unix::fs::symlink(root.join("snapshot"), root.join("main")).unwrap();
    assert_eq!(names(&[&root.join("snapshot")], DataFormat::Auto).unwrap(), ["1.parquet", "2.parquet"]);
    let twice = names(&[&root.join("snapshot/1.parquet"), &root.join("main/1.parquet")], DataFormat::Auto);
    assert!(twice.unwrap_err().to_string().contains("listed twice"));
}

#[test]
fn tables_with_a_log_are_refused_wherever_they_are_met() {
    for (kind, marker) in [
        ("Delta", "_delta_log/0.json"),
        ("Hudi", ".hoodie/hoodie.properties"),
        ("Iceberg", "metadata/v2.metadata.json"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(root, &["t/data/day=1/new.parquet", "t/data/old.parquet", &format!("t/{marker}"), "other/a.parquet"]);
        let data = root.join("t/data");
        for path in [root.to_owned(), root.join("t"), data.clone(), data.join("*.parquet"), root.join("t/**/*.parquet")]
        {
            let error = names(&[&path], DataFormat::Auto).unwrap_err().report();
            assert!(error.contains(kind) && error.contains("name the live files"), "{}: {error}", path.display());
        }
        assert_eq!(names(&[&data.join("day=1/new.parquet")], DataFormat::Auto).unwrap(), ["new.parquet"]);
        assert_eq!(names(&[&root.join("other")], DataFormat::Auto).unwrap(), ["a.parquet"]);
    }
}

#[test]
fn splits_side_by_side_are_refused_and_can_be_named() {
    for layout in [
        ["data/train-0-of-1.parquet", "data/test-0-of-1.parquet"],
        ["train/0.parquet", "validation/0.parquet"],
        ["Train.parquet", "x/dev.arrow"],
        ["corpus_train_0.parquet", "corpus_val_0.parquet"],
        ["a-test.arrow", "b-validation.arrow"],
    ] {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(root, &layout);
        for path in [root.to_owned(), root.join("**/*")] {
            let error = names(&[&path], DataFormat::Auto).unwrap_err().report();
            assert!(error.contains("splits"), "{error}");
        }
        let [first, second] = layout.map(|name| root.join(name));
        assert_eq!(names(&[&first, &second], DataFormat::Auto).unwrap().len(), 2, "named files are taken");
    }
    let root = tempfile::tempdir().unwrap();
    touch(
        root.path(),
        &["train-0.parquet", "train-1.parquet", "contest-0.parquet", "values.parquet", "training.parquet"],
    );
    assert_eq!(names(&[root.path()], DataFormat::Auto).unwrap().len(), 5);
}

#[test]
fn caches_of_datasets_are_refused_unless_they_are_named() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["d/x.arrow", "d/cache-0123456789abcdef.arrow", "e/cache-0123456789abcdef_00000_of_00002.arrow"]);
    touch(root, &["f/cache-control.arrow"]);
    for path in ["d", "e", "d/*.arrow", "[de]/*"] {
        let error = names(&[&root.join(path)], DataFormat::Auto).unwrap_err().report();
        assert!(error.contains("cache") && error.contains("save_to_disk"), "{error}");
    }
    assert_eq!(names(&[&root.join("f")], DataFormat::Auto).unwrap(), ["cache-control.arrow"]);
    let named = names(&[&root.join("d/cache-*.arrow")], DataFormat::Auto).unwrap();
    assert_eq!(named, ["cache-0123456789abcdef.arrow"]);
}

#[test]
fn folders_that_a_pattern_matches_are_searched() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["p/a/2.parquet", "p/b.parquet/1.parquet", "p/c.parquet", "p/n/n.txt", "p/_x/3.parquet"]);
    let all = ["a/2.parquet", "b.parquet/1.parquet", "c.parquet"];
    assert_eq!(names(&[&root.join("p/*")], DataFormat::Auto).unwrap(), all);
    assert_eq!(names(&[&root.join("p/*.parquet")], DataFormat::Auto).unwrap(), all[1..]);
    assert_eq!(names(&[&root.join("p/**")], DataFormat::Auto).unwrap(), all);
    assert_eq!(
        names(&[&root.join("[p]/[ab]*")], DataFormat::Auto).unwrap(),
        ["p/a/2.parquet", "p/b.parquet/1.parquet"]
    );
}

#[test]
fn files_that_the_format_leaves_out_are_told() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    touch(root, &["a.parquet", "x/b.feather", "x/c.ARROW", "n.txt"]);
    for (format, kept, left) in
        [(DataFormat::Parquet, 1, Some("2 files")), (DataFormat::Arrow, 2, Some("1 file")), (DataFormat::Auto, 3, None)]
    {
        let found = find(&Files::local(), &[root.to_str().unwrap().to_owned()], format).unwrap();
        assert_eq!(found.shards.len(), kept);
        assert_eq!(found.warnings.len(), usize::from(left.is_some()), "{:?}", found.warnings);
        assert!(left.is_none_or(|left| found.warnings[0].contains(left)), "{:?}", found.warnings);
    }
}
