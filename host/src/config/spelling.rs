//! The nearest name, for "did you mean".

/// Of `known`, the name that a user most probably meant by `word`; `None` if none is near.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // `pci_path` for `pci-path` is the commonest slip: propolis mixes both spellings.
    let plain = |text: &str| text.to_lowercase().replace('_', "-");
    let word = plain(word);
    // A third of the letters may differ, but not so many that "pci-virtio-" alone makes two drivers alike.
    let limit = (word.chars().count() / 3).clamp(1, 3);
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&word, &plain(name)), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// "did you mean `x`?" if something is near.
pub fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, known).map(|name| format!("did you mean `{name}`?"))
}

/// Whether one of `keys` that is not `known` was probably meant to be `name`: then to say that `name` is missing would be
/// to say the same thing twice.
pub fn misspelt<'a>(
    name: &str,
    keys: impl IntoIterator<Item = &'a String>,
    known: impl Iterator<Item = &'a str> + Clone,
) -> bool {
    keys.into_iter()
        .filter(|key| !known.clone().any(|known| known == key.as_str()))
        .any(|key| nearest(key, known.clone()) == Some(name))
}

/// Names in a row: "a, b, c"; "nothing" if there is none.
pub fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    if names.is_empty() {
        "nothing".to_string()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let known = ["pci-path", "block_dev", "driver"];
        assert_eq!(nearest("pci_path", known), Some("pci-path"));
        assert_eq!(nearest("blok_dev", known), Some("block_dev"));
        assert_eq!(nearest("drvier", known), Some("driver"));
        assert_eq!(nearest("serial", known), None);
    }
}
