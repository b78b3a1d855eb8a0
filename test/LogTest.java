import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import java.time.*;
import java.util.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** The lines that the hook logs, byte for byte. Where they go is for PlacesTest. */
class LogTest {

    private static final String FIRST = "Waiting for build processes to finish...";
    private static final String ODD = "${env:PATH} $$ say \"hi\" back\\slash\\ two\nlines\r\n\tand a tab"
            + "\u0001\u001f\u007f d\u00e9ploiement \u2603 \u6784\u5efa \ud83d\udc33 </script>\u2028 ' @x";
    private static final Server SERVER = Server.start();

    @AfterAll
    static void stopServer() { SERVER.close(); }

    /** Starts a hook that looks twice, with more settings, given in turn. Returns it when it has ended. */
    private static Hook ended(List<String> flags, Object... settings) {
        Map<String, String> env = Hook.env("BUILDKITD_PORT", SERVER.port(), "CHECK_FREQUENCY_MS", 20,
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "DEBUG", "yes");
        env.putAll(Hook.env(settings));
        Hook hook = Hook.start(env, flags.toArray(String[]::new));
        assertThat(hook.exitCode()).isZero();
        assertThat(hook.out()).isEmpty();
        return hook;
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void areJsonWithAMessageATimestampAndALevelWhateverThePrefix(boolean byFlag) {
        Hook hook = ended(byFlag ? List.of("--log-prefix=" + ODD) : List.of(), "LOG_PREFIX", ODD, "LC_ALL", "C.UTF-8");
        for (JsonNode line : hook.log()) {
            List<String> names = new ArrayList<>();
            line.fieldNames().forEachRemaining(names::add);
            assertThat(names).containsExactly("message", "timestamp", "level");
            assertThat(line.get("message").asText()).startsWith(ODD + " ");
            assertThat(line.get("timestamp").asText()).matches("\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ");
            assertThat(Instant.parse(line.get("timestamp").asText()))
                    .isBetween(Instant.now().minus(Hook.PATIENCE), Instant.now());
        }
        assertThat(hook.log()).extracting(line -> line.get("level").asText())
                .containsExactly("info", "debug", "info", "debug", "info");
        assertThat(hook.messages("info")).first().isEqualTo(ODD + " " + FIRST);
        assertThat(hook.messages("debug")).containsOnly(ODD + " Active connections to buildkitd: 0");
    }

    @Test
    void areStillJsonWhereTheLocaleHasNoSuchCharacters() {
        assertThat(ended(List.of(), "LOG_PREFIX", "\u6784\u5efa \ud83d\udc33", "LC_ALL", "C").messages("info"))
                .first().asString().endsWith(" " + FIRST);
    }

    @Test
    void haveNoPrefixWhenItIsSetButEmpty() {
        assertThat(ended(List.of(), "LOG_PREFIX", "").messages("info")).first().isEqualTo(FIRST);
        assertThat(ended(List.of("--log-prefix=")).messages("info")).first().isEqualTo(FIRST);
    }

    @Test
    void areTheMessagesAloneInTextFormatEachOnOneLine() {
        String prefix = "two\nlines \"\u00e9\"";
        assertThat(ended(List.of(), "LOG_FORMAT", "text", "LC_ALL", "C.UTF-8", "LOG_PREFIX", prefix).err())
                .hasSize(5).startsWith("two lines \"\u00e9\" " + FIRST)
                .allMatch(line -> line.startsWith("two lines \"\u00e9\" "));
    }
}
