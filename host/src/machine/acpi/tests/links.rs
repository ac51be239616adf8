//! The interrupt links as ACPICA's interpreter, which operating systems use too, executes them.

use super::*;

/// Evaluates objects one after the other and returns what each gave, in acpiexec's words.
fn evaluate(dsdt: &[u8], calls: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dsdt.dat");
    fs::write(&file, dsdt).unwrap();
    let mut commands: Vec<String> = calls.iter().map(|call| format!("execute {call}")).collect();
    commands.push("quit".to_owned());
    let output = Command::new("acpiexec")
        .arg("-b")
        .arg(commands.join(";"))
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("Error") && !text.contains("AE_"), "{text}");
    text.split("Evaluating ")
        .skip(1)
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_link_is_what_its_register_says_and_the_register_what_it_was_set_to() {
    if Command::new("acpiexec").arg("-v").output().is_err() {
        println!(
            "SKIPPED: a_link_is_what_its_register_says: acpiexec is not installed (Debian package acpica-tools)"
        );
        return;
    }
    let dsdt = &direct(1, Board::default())[3].1;
    for (link, other) in [("LNKA", "LNKB"), ("LNKD", "LNKC")] {
        let at = |link: &str, object: &str| format!("\\_SB_.PCI0.ISA_.{link}.{object}");
        let set = at(link, "_SRS (89 06 00 09 01 0a 00 00 00 79 00)");
        let calls = [
            at(link, "_DIS"),
            at(link, "_STA"),
            at(other, "_STA"),
            at(link, "_CRS"),
            set,
            at(link, "_STA"),
            at(link, "_CRS"),
        ];
        let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
        let said = evaluate(dsdt, &calls);
        assert_eq!(said.len(), calls.len());
        for (call, what) in [
            (1, "0000000000000009"),
            (2, "000000000000000B"),
            (3, "89 06 00 09 01 00 00 00 00 79 00"),
            (5, "000000000000000B"),
            (6, "89 06 00 09 01 0A 00 00 00 79 00"),
        ] {
            assert!(said[call].contains(what), "{}", said[call]);
        }
    }
}

#[test]
fn every_pin_is_wired_to_the_link_that_its_line_comes_from() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!(
            "SKIPPED: every_pin_is_wired_to_the_link: iasl is not installed (Debian package acpica-tools)"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("dsdt.dat"),
        &direct(1, Board::default())[3].1,
    )
    .unwrap();
    let status = Command::new("iasl")
        .args(["-d", "dsdt.dat"])
        .current_dir(folder.path())
        .output()
        .unwrap()
        .status;
    assert!(status.success());
    let source = fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
    let table = source.split_once("Name (_PRT").unwrap().1;
    let links: Vec<&str> = table
        .match_indices(".ISA.LNK")
        .map(|(at, _)| &table[at + 5..at + 9])
        .collect();
    assert_eq!(links.len(), 128, "{table}");
    // Device 4's INTA and device 31's INTD.
    assert_eq!((links[16], links[127]), ("LNKD", "LNKB"));
    for (at, link) in links.iter().enumerate() {
        let (device, pin) = ((at / 4) as u8, (at % 4) as u8 + 1);
        let letter = char::from(b'A' + crate::pci::intx_link(device, pin) as u8);
        assert_eq!(link.chars().last(), Some(letter), "{device} {pin}");
    }
}
