//! Protects: the settings that users read about are the settings there are.

use forebay::settings;

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
