//! Protects: the table of settings is the only place where a setting is written.

use forebay::Loader;
use forebay::settings::{self, Compared, Config, SettingKind};
use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, write};

const README: &str = include_str!("../../README.md");

#[test]
fn readme_holds_the_table_of_settings() {
    let (_, after) = README.split_once("<!-- settings:begin -->\n").expect("README marks where the settings begin");
    let (table, _) = after.split_once("<!-- settings:end -->").expect("README marks where the settings end");
    assert!(
        table == settings::markdown(),
        "README's settings are out of date; put the output of `forebay settings --markdown` between the markers:\n{}",
        settings::markdown()
    );
}

#[test]
fn a_state_compares_every_content_setting_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.arrow");
    write(&path, Container::ArrowFile(None), Dtype::I32, Shape::List, &documents(20, 9, 100, 1), 7);
    let config = Config { data: vec![path.display().to_string()], seq_len: 2, ..Config::default() };
    let state = Loader::open(config).unwrap().state();
    let has = |key: &str| state.entries().iter().any(|(name, _)| name == key);
    for setting in settings::all() {
        let name = setting.name;
        assert_eq!(setting.kind() == SettingKind::Content, setting.compared().is_some());
        match setting.compared() {
            None => assert!(!has(name), "`{name}` is no content setting"),
            Some(Compared::ByCorpus(keys, _) | Compared::ByProgress(keys, _)) => {
                assert!(keys.iter().all(|key| has(key)), "`{name}`: {keys:?}");
            }
            Some(_) => assert!(has(name), "`{name}` is not compared"),
        }
    }
}
