//! Dates and seconds since 1970.

/// A date of the proleptic Gregorian calendar and a time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub year: i64,
    pub month: i64,
    pub day: i64,
    pub hour: i64,
    pub minute: i64,
    pub second: i64,
}

impl DateTime {
    /// From seconds since 1970. Days are counted from 1 March of year 0, so that a leap day is the last of its year.
    pub fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (
            seconds.div_euclid(86_400) + 719_468,
            seconds.rem_euclid(86_400),
        );
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Seconds since 1970; fields out of their range carry over.
    pub fn to_seconds(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = (self.month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// 1 is Sunday.
    pub fn weekday(self) -> i64 {
        (self.to_seconds().div_euclid(86_400) + 4).rem_euclid(7) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_convert_both_ways() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_709_251_199, 2024, 2, 29, 5),
            (4_107_542_400, 2100, 3, 1, 2),
            (-86_400, 1969, 12, 31, 4),
        ] {
            let date = DateTime::from_seconds(seconds);
            assert_eq!(
                (date.year, date.month, date.day, date.weekday()),
                (year, month, day, weekday),
                "{seconds}"
            );
            assert_eq!(date.to_seconds(), seconds);
        }
    }
}
