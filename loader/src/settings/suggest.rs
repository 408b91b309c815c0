//! Finds the name that a mistyped name most likely means.

/// Returns the one of `names` that a mistyped `name` most likely means.
pub fn nearest_of<T: AsRef<str>>(name: &str, names: impl IntoIterator<Item = T>) -> Option<T> {
    let name = name.to_lowercase();
    let furthest = (name.len() / 3).max(2);
    names
        .into_iter()
        .filter_map(|candidate| {
            let text = candidate.as_ref().to_lowercase();
            let part = name.len().min(text.len()) > 3 && (text.contains(&name) || name.contains(&text));
            let distance = edit_distance(&name, &text);
            (part || distance <= furthest).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Counts the insertions, deletions and replacements of bytes that turn `a` into `b`.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_counts_single_changes() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(nearest_of("wieght", ["weight", "epochs"]), Some("weight"));
        assert_eq!(nearest_of("zzzzzz", ["weight", "epochs"]), None);
    }
}
