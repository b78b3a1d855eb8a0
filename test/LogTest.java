import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import java.time.*;
import java.util.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The lines that the hook logs, byte for byte. Where they go is for PlacesTest. */
class LogTest {

    private static final Server SERVER = Server.start();
    private static final String PORT = "--port=" + SERVER.port();

    @AfterAll
    static void stopServer() {
        SERVER.close();
    }

    private static final String FIRST = "Waiting for build processes to finish...";

    @ParameterizedTest
    @ValueSource(strings = {"[PreStop Hook]", "say \"hi\"", "back\\slash\\", "two\nlines\r\n\tand a tab",
        "\u0001\u001f\u007f",
        "d\u00e9ploiement \u2603 \u6784\u5efa \ud83d\udc33", "${env:PATH} $$ $x", "</script>\u2028", " ", "'", "@x"})
    void areJsonWhateverThePrefix(String prefix) {
        Map<String, String> settings = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "LOG_PREFIX", prefix,
                "LC_ALL", "C.UTF-8");
        try (Hook byEnvironment = Hook.start(settings, PORT);
                Hook byFlag = Hook.start(Hook.env("LC_ALL", "C.UTF-8"), PORT, "--quiet-seconds=0",
                        "--log-prefix=" + prefix)) {
            for (Hook hook : List.of(byEnvironment, byFlag)) {
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.log()).isNotEmpty().allSatisfy(
                        line -> assertThat(line.get("message").asText()).startsWith(prefix + " "));
                assertThat(hook.log().get(0).get("message").asText()).isEqualTo(prefix + " " + FIRST);
            }
        }
    }

    @Test
    void haveAMessageATimestampAndALevel() {
        try (Hook hook = Hook.start(Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "DEBUG", "yes"), PORT)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).isEmpty();
            for (JsonNode line : hook.log()) {
                List<String> names = new ArrayList<>();
                line.fieldNames().forEachRemaining(names::add);
                assertThat(names).containsExactly("message", "timestamp", "level");
                assertThat(line.get("timestamp").asText()).matches("\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ");
                assertThat(Instant.parse(line.get("timestamp").asText()))
                        .isBetween(Instant.now().minus(Duration.ofMinutes(1)), Instant.now());
                assertThat(line.get("level").asText()).isIn("debug", "info", "warning");
            }
            assertThat(hook.messages("debug")).containsExactly("[PreStop Hook] Active connections to buildkitd: 0");
        }
    }

    @Test
    void areStillJsonWhereTheLocaleHasNoSuchCharacters() {
        Map<String, String> settings = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0,
                "LOG_PREFIX", "\u6784\u5efa \ud83d\udc33", "LC_ALL", "C");
        try (Hook hook = Hook.start(settings, PORT)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info").get(0)).endsWith(" " + FIRST);
        }
    }

    @Test
    void haveNoPrefixWhenItIsSetButEmpty() {
        try (Hook hook = Hook.start(Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "LOG_PREFIX", ""), PORT)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).startsWith(FIRST);
        }
    }

    @Test
    void areTheMessagesAloneInTextFormatEachOnOneLine() {
        Map<String, String> settings = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "LOG_FORMAT", "text",
                "LC_ALL", "C.UTF-8", "LOG_PREFIX", "two\nlines \"\u00e9\"");
        try (Hook hook = Hook.start(settings, PORT)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).startsWith("two lines \"\u00e9\" " + FIRST)
                    .allSatisfy(line -> assertThat(line).startsWith("two lines \"\u00e9\" "));
        }
    }
}
